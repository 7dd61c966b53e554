"""Which prefixes are asked for again and again.

A copy of a prefix on a second worker costs that worker the time of computing it, once. For a prefix that many requests
share the copy earns it back at once; for one conversation's history it never does. The two look the same in the
index, so the router remembers what recent requests matched.
"""

from __future__ import annotations

from kvcache.keys import BlockKey

REMEMBERED = 4096
"""Longest matches kept, the latest: the state is bounded."""
POPULAR = 2
"""So many earlier requests with the same longest match make a prefix popular."""


class Reuse:
    """How often each of the latest longest matches was met. O(1) an operation."""

    __slots__ = ("_met",)

    def __init__(self) -> None:
        self._met: dict[BlockKey, int] = {}  # the one met last is last

    def popular(self, key: BlockKey) -> bool:
        """Whether requests other than those of one conversation end their match at this key."""
        return self._met.get(key, 0) >= POPULAR

    def note(self, key: BlockKey) -> None:
        """One more request whose longest match on any worker ends at this key."""
        self._met[key] = self._met.pop(key, 0) + 1
        if len(self._met) > REMEMBERED:
            del self._met[next(iter(self._met))]
