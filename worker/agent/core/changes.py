"""Changes of the agent's blocks, as events of the feed."""

from __future__ import annotations

from kvcache.feed import Event, Removed, Stored, Tier
from kvcache.keys import BlockKey


class Changes:
    """Changes in order. Consecutive removals from one place (a tier of a group) are one event, and so are the stores of
    consecutive blocks, which vLLM reports one by one for the slower tiers."""

    __slots__ = ("_events", "_keys", "_parent", "_place", "_stores")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._place = (Tier.GPU, 0)
        self._stores = False
        self._parent: BlockKey | None = None
        self._keys: list[BlockKey] = []

    def removed(self, place: tuple[Tier, int], keys: list[BlockKey]) -> None:
        if not keys:
            return
        if self._keys and (self._stores or self._place != place):
            self._flush()
        self._place, self._stores = place, False
        self._keys += keys

    def stored(self, place: tuple[Tier, int], parent: BlockKey | None, keys: list[BlockKey]) -> None:
        """A run of blocks, each the child of the one before."""
        if not keys:
            return
        if not (self._keys and self._stores and self._place == place and self._keys[-1] == parent):
            self._flush()
            self._place, self._stores, self._parent = place, True, parent
        self._keys += keys

    def other(self, event: Event) -> None:
        self._flush()
        self._events.append(event)

    def take(self) -> list[Event]:
        """All of them."""
        self._flush()
        return self._events

    def _flush(self) -> None:
        if self._keys:
            keys, self._keys = tuple(self._keys), []
            event = Stored(self._parent, keys, *self._place) if self._stores else Removed(keys, *self._place)
            self._events.append(event)
