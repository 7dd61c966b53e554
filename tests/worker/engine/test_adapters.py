"""How many LoRA adapters run at once: `max_loras`, as vLLM's scheduler honours it.

Not covered: how adapters are loaded (tests/worker/test_adapters.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvcache.keys import CacheScope
from tests.worker.engine.conftest import drain, make_engine
from worker.emulator.engine.engine import Engine

A, B, C = (CacheScope(adapter=name) for name in "abc")


def running(engine: Engine) -> tuple[int, int, int]:
    """Sequences that run, that wait, and those of them that were passed over."""
    load = engine.load()
    return load.running, load.waiting, engine.deferred


def test_a_third_adapter_waits_and_does_not_block_the_queue(request_of: Callable) -> None:
    engine = make_engine(max_loras=2)
    for scope in (A, B, C, C, A, CacheScope()):
        engine.submit(request_of(20, max_tokens=3, scope=scope), 0.0)
    engine.advance(0.0)
    assert running(engine) == (4, 2, 2)
    assert engine.adapters() == ["a", "b", "c"]
    assert len(drain(engine)) == 18
    assert running(engine) == (0, 0, 0)


def test_without_a_limit_every_adapter_runs(request_of: Callable) -> None:
    engine = make_engine()
    for scope in (A, B, C):
        engine.submit(request_of(20, max_tokens=3, scope=scope), 0.0)
    engine.advance(0.0)
    assert running(engine) == (3, 0, 0)


def test_a_request_that_was_passed_over_can_be_aborted(request_of: Callable) -> None:
    engine = make_engine(max_loras=1)
    first, second = request_of(20, max_tokens=9, scope=A), request_of(20, scope=B)
    for request in (first, second):
        engine.submit(request, 0.0)
    engine.advance(0.0)
    engine.abort(second.request_id, 0.0)
    assert running(engine) == (1, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_never_more_adapters_run_than_the_limit_and_every_request_ends(request_of: Callable, seed: int) -> None:
    rng = random.Random(seed)
    limit = rng.randint(1, 3)
    engine = make_engine(max_loras=limit, blocks=12, max_num_seqs=4)
    requests = [
        request_of(rng.randint(1, 100), max_tokens=rng.randint(1, 9), scope=CacheScope(adapter=adapter))
        for adapter in rng.choices(["", *"abcde"], k=30)
    ]
    adapters = {request.request_id: request.scope.adapter for request in requests}
    for request in requests:
        engine.submit(request, 0.0)
    tokens: dict[float, set[str]] = {}
    ended = 0
    for output in drain(engine):
        tokens.setdefault(output.at, set()).add(adapters[output.request_id])
        ended += output.finish_reason is not None
    assert max(len(names - {""}) for names in tokens.values()) <= limit
    assert ended == len(requests)
