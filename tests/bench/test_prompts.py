"""The pooled cache, which bounds the hit rate of any router, and prompts of token ids.

Not covered: that prompts are tokenised as a router and a worker do it (tests/kvcache).
"""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.prompts import PooledCache, Prompt, pooled_hit_rate, prompts
from bench.workloads import TimedRequest, Workload
from bench.workloads.base import completion
from kvcache.keys import DEFAULT_SCOPE
from kvcache.prompts import PromptError
from kvcache.tokens.tokenizer import load_tokenizer


def prompt(tokens: list[int]) -> Prompt:
    request: TimedRequest = completion(0, 0.0, array("I", tokens), 1)
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


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        pytest.param([7, 50_257, 7], "Token id 50257 is out of vocabulary", id="beyond the vocabulary"),
        pytest.param([], "at least one prompt", id="none"),
    ],
)
def test_token_ids_that_a_worker_would_refuse_are_refused_in_its_words(ids: list[int], why: str) -> None:
    workload = Workload("w", 0, 1, {}, lambda: iter([completion(0, 0.0, array("I", ids), 1)]))
    with pytest.raises(PromptError, match=why):
        list(prompts(workload, load_tokenizer("gpt2")))


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
