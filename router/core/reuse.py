"""What requests reuse: which prefixes many of them share, and how much of one worker's cache they found.

A copy of a prefix on a second worker costs that worker the time of computing it, once. For a prefix that many requests
share the copy pays off at once; for one conversation's history it never does. The index cannot tell the two apart, so
the router remembers what recent requests matched.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kvcache.keys import BlockKey

REMEMBERED = 4096
"""Longest matches that are remembered, the most recent ones: the state is bounded."""
POPULAR = 2
"""A prefix is popular once this many earlier requests had their longest match end there."""
HALF_LIFE = 256
"""A match counts half after so many later matches of popular prefixes."""


class _Matches:
    """Of one key: how many there were, and their weight when the count of all popular ones was `at`."""

    __slots__ = ("at", "count", "weight")

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0.0
        self.at = 0


class Popularity(NamedTuple):
    """How much a prefix is asked for, apart from the conversations that have gone on beyond it."""

    share: float
    """Of the latest matches of popular prefixes, those that ended here: 0..1."""
    matches: float
    """How many these are."""


class PrefixPopularity:
    """How many requests had their longest match end at each of the latest such blocks. O(1) an operation."""

    __slots__ = ("_matches", "_noted", "_popular_charge", "_recompute_charge", "_total")

    def __init__(self, recompute_charge: float, popular_charge: float) -> None:
        """The charges: see `FleetConfig`."""
        self._recompute_charge = recompute_charge
        self._popular_charge = popular_charge
        self._matches: dict[BlockKey, _Matches] = {}  # in the order of the last match
        self._noted = 0
        """Matches of popular prefixes so far."""
        self._total = 0.0
        """Their weight."""

    def find(self, key: BlockKey) -> Popularity | None:
        """How popular the prefix up to this key is; None: no requests other than those of one conversation end their
        match there."""
        found = self._matches.get(key)
        if found is None or found.count < POPULAR:
            return None
        matches = found.weight * math.exp2((found.at - self._noted) / HALF_LIFE)
        return Popularity(matches / self._total if self._total else 0.0, matches)

    def charge(self, best: BlockKey, holders: int, workers: int) -> float:
        """Seconds that cost adds for each second of computing what `holders` of the `workers` have: the prefix up to
        the key `best`. docs/routing.md, "Cost", has the rules as a table."""
        popularity = self.find(best)
        if popularity is None:
            return self._recompute_charge
        if popularity.share * workers > holders:
            # Those that have it get more requests than their share, and a further copy will be used by as many.
            return 1.0 / max(popularity.matches / workers, 1.0) - 1.0
        return self._popular_charge

    def note(self, key: BlockKey) -> None:
        """Count one more request whose longest match on any worker ends at this key."""
        found = self._matches.pop(key, None) or _Matches()
        self._matches[key] = found
        found.count += 1
        if found.count > POPULAR:
            self._noted += 1
            self._total = self._total * _FADE + 1.0
            found.weight = found.weight * math.exp2((found.at - self._noted) / HALF_LIFE) + 1.0
            found.at = self._noted
        if len(self._matches) > REMEMBERED:
            del self._matches[next(iter(self._matches))]


_FADE = 2 ** (-1 / HALF_LIFE)


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
