"""The last decisions, for a person who asks what the router is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from router.core.decision import Decision

KEPT = 20


class RecentDecisions:
    """A ring of the latest decisions that were carried out."""

    __slots__ = ("_ring",)

    def __init__(self, kept: int = KEPT) -> None:
        self._ring: deque[tuple[float, Decision]] = deque(maxlen=kept)

    def note(self, decision: Decision, now: float) -> None:
        """One more request went where this decision says."""
        self._ring.append((now, decision))

    def newest_first(self, now: float) -> Iterator[tuple[float, Decision]]:
        """Each with its age in seconds."""
        return ((now - at, decision) for at, decision in reversed(self._ring))
