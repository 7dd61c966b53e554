"""The engine's micro-benchmark runs; what it measures is for people to read, not for a test to judge."""

from __future__ import annotations

from bench.micro.engine import block_operations, decode, prefill


def test_it_measures_every_operation() -> None:
    seconds = block_operations(256, rounds=1)
    assert set(seconds) == {"allocate and evict", "store", "release", "look up and acquire"}
    assert all(value >= 0 for value in (*seconds.values(), decode(2, tokens=4, rounds=1), *prefill(4096, rounds=1)))
