"""The pooled cache, which bounds the hit rate of any router.

Not covered: that prompts are tokenised as a router and a worker do it (tests/kvcache).
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.prompts import PooledCache, Prompt, pooled_hit_rate
from bench.workloads import TimedRequest
from bench.workloads.base import completion
from kvcache.keys import DEFAULT_SCOPE


def prompt(tokens: list[int]) -> Prompt:
    request: TimedRequest = completion(0, 0.0, tokens, 1)
    return Prompt(request, tokens, DEFAULT_SCOPE)


def test_the_last_token_is_always_computed() -> None:
    """vLLM rule 8: 32 cached tokens give a hit of 16, 33 of 32."""
    tokens = list(range(600, 640))
    assert pooled_hit_rate([prompt(tokens[:32])] * 2, 100, 16) == 16 / 64
    assert pooled_hit_rate([prompt(tokens[:33])] * 2, 100, 16) == 32 / 66


def test_the_least_recently_used_tail_goes_first() -> None:
    cache = PooledCache(4)
    a, b = [b"a1", b"a2", b"a3"], [b"b1", b"b2"]
    cache.admit(a, 3)
    cache.admit(b, 2)  # one block too many: the tail of the older prompt goes
    assert cache.admit(a, 3) == 2


def test_nothing_cached_is_no_hit() -> None:
    assert pooled_hit_rate([], 10, 16) == 0.0


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=20), st.integers(1, 12))
def test_the_cache_stays_closed_under_prefixes(paths: list[list[int]], capacity: int) -> None:
    """A block is never held without the blocks before it, else a hit could not reach it."""
    cache = PooledCache(capacity)
    seen: list[list[bytes]] = []
    for path in paths:
        keys = [bytes(path[: depth + 1]) for depth in range(len(path))]
        cache.admit(keys, len(keys))
        seen.append(keys)
    for key in cache.held():
        assert len(key) == 1 or key[:-1] in cache.held()
    assert len(cache.held()) <= capacity
