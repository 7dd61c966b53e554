"""How much of a worker's cache is of use: the blocks that requests found there lately."""

from __future__ import annotations

import math


class Heat:
    """A count that halves with every half-life. O(1), and it holds two numbers."""

    __slots__ = ("_at", "_count", "_half_life")

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._count = 0.0
        self._at = 0.0

    def add(self, blocks: int, now: float) -> None:
        """A request served here reused so many blocks."""
        self._count = self.value(now) + blocks
        self._at = now

    def value(self, now: float) -> float:
        """Blocks reused, each halved with every half-life of its age."""
        return self._count * math.exp2((self._at - now) / self._half_life) if self._count else 0.0

    def clear(self) -> None:
        """The cache that was of use is gone."""
        self._count = 0.0
