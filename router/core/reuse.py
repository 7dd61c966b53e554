"""What requests reuse: which prefixes many of them share, and how much of one worker's cache they found.

A copy of a prefix on a second worker costs that worker the time of computing it, once. For a prefix that many requests
share the copy pays off at once; for one conversation's history it never does. The index cannot tell the two apart, so
the router remembers what recent requests matched.
"""

from __future__ import annotations

import math

from kvcache.keys import BlockKey

REMEMBERED = 4096
"""Longest matches that are remembered, the most recent ones: the state is bounded."""
POPULAR = 2
"""A prefix is popular once this many earlier requests had their longest match end there."""


class PrefixPopularity:
    """How many requests had their longest match end at each of the latest such blocks. O(1) an operation."""

    __slots__ = ("_matches",)

    def __init__(self) -> None:
        self._matches: dict[BlockKey, int] = {}  # in the order of the last match

    def popular(self, key: BlockKey) -> bool:
        """Whether requests other than those of one conversation end their match at this key."""
        return self._matches.get(key, 0) >= POPULAR

    def note(self, key: BlockKey) -> None:
        """Count one more request whose longest match on any worker ends at this key."""
        self._matches[key] = self._matches.pop(key, 0) + 1
        if len(self._matches) > REMEMBERED:
            del self._matches[next(iter(self._matches))]


class ReuseScore:
    """Blocks that requests reused on one worker; each counts half after every half-life. O(1), two numbers of state."""

    __slots__ = ("_count", "_counted_at", "_half_life")

    def __init__(self, half_life: float) -> None:
        """`half_life` in seconds."""
        self._half_life = half_life
        self._count = 0.0
        self._counted_at = 0.0

    def add(self, blocks: int, now: float) -> None:
        """A request that the worker served reused this many blocks."""
        self._count = self.value(now) + blocks
        self._counted_at = now

    def value(self, now: float) -> float:
        """Blocks reused, each weighted by 2^(-age / half-life)."""
        return self._count * math.exp2((self._counted_at - now) / self._half_life) if self._count else 0.0

    def clear(self) -> None:
        """The cache that was reused is gone."""
        self._count = 0.0
