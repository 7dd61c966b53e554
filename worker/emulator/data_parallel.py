"""The engines of one process: its data-parallel ranks, and which of them takes a request.

Checked against vLLM 0.32 with `--data-parallel-size 2` (docs/vllm.md) and `DPLBAsyncMPClient` of its
v1/engine/core_client.py. vLLM balances by counts that its coordinator reports every 100 ms, and in each of several API
servers by itself; here there is one API server, and the counts are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.errors import ApiError
from worker.emulator.rank import Rank

QUEUE_WEIGHT = 6.0
USAGE_THRESHOLD = 0.5
"""What a waiting request counts in addition, for each unit by which the cache is used beyond the threshold."""


class DataParallelEngines:
    """The ranks of a process, at least one."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = ranks
        self._first = 0
        """The rank that is looked at first, so that equal ones take turns."""

    def check(self, rank: int | None) -> None:
        """Raises `ApiError` (400) if a request asks for a rank that does not exist."""
        if rank is not None and not 0 <= rank < len(self._ranks):
            raise ApiError(400, f"data_parallel_rank {rank} is out of range [0, {len(self._ranks)}).")

    def choose(self, rank: int | None) -> Rank:
        """The rank that takes the next sequence: the one asked for, or else the one with the least load."""
        if rank is not None:
            return self._ranks[rank]
        number = len(self._ranks)
        if number == 1:
            return self._ranks[0]
        order = [(self._first + step) % number for step in range(number)]
        self._first = (self._first + 1) % number
        return self._ranks[min(order, key=self._score)]

    @property
    def dead(self) -> bool:
        """Whether any engine has failed; then the process ends."""
        return any(rank.async_engine.dead.is_set() for rank in self._ranks)

    @property
    def active(self) -> int:
        """Number of requests that no engine has finished."""
        return sum(rank.async_engine.active for rank in self._ranks)

    def abort_all(self) -> None:
        """Abort every request and tell its handler."""
        for rank in self._ranks:
            rank.async_engine.abort_all()

    def reset_prefix_cache(self) -> bool:
        """Drop every cached block of every rank. False if a rank keeps its blocks, because a request runs there."""
        done = [rank.async_engine.reset_prefix_cache() for rank in self._ranks]
        return all(done)

    def _score(self, number: int) -> float:
        engine = self._ranks[number].async_engine
        load = engine.load()
        pressure = max(0.0, 1.0 - load.free_blocks / load.total_blocks - USAGE_THRESHOLD)
        return max(engine.active, load.waiting + load.running) + load.waiting * QUEUE_WEIGHT * pressure
