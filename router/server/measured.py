"""Measures what the keys of one prompt take: the part of a decision that is spread over all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvcache.keys import BlockKey, CacheScope, Image, PrefixKeys


class MeasuredKeys(PrefixKeys):
    """`PrefixKeys` that add up the seconds spent on hashing, by `clock`. `tokenize_seconds`: what it took to turn the
    request into the token ids."""

    __slots__ = ("_clock", "hash_seconds", "tokenize_seconds")

    def __init__(
        self,
        packed: bytes,
        block_size: int,
        scope: CacheScope,
        images: Sequence[Image],
        clock: Callable[[], float],
        tokenize_seconds: float,
    ) -> None:
        began = clock()
        self._clock = clock
        self.tokenize_seconds = tokenize_seconds
        super().__init__(packed, block_size, scope, images)
        self.hash_seconds = clock() - began

    def key(self, depth: int) -> BlockKey:
        began = self._clock()
        key = super().key(depth)
        self.hash_seconds += self._clock() - began
        return key

    def compute(self, checkpoint: Callable[[], None] = lambda: None) -> None:
        began = self._clock()
        super().compute(checkpoint)
        self.hash_seconds += self._clock() - began

    def all(self, above: int = 0, stride: int = 1) -> list[BlockKey]:
        began, before = self._clock(), self.hash_seconds
        keys = list(super().between(above, self.depth, stride))
        self.hash_seconds = before + self._clock() - began
        return keys

    def between(self, above: int, end: int, stride: int = 1) -> Iterator[BlockKey]:
        keys = super().between(above, end, stride)
        while True:
            began, before = self._clock(), self.hash_seconds
            key = next(keys, None)
            self.hash_seconds = before + self._clock() - began  # it may have called `key`
            if key is None:
                return
            yield key
