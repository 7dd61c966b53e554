"""Flow control where a gateway asks: requests that wait for their turn, within the subset that the gateway allows.

Not covered: the order of turns (tests/router/core/test_flow.py); what a gateway's client gets (tests/envoy).
"""

from __future__ import annotations

import asyncio

import orjson
import pytest
from prometheus_client import CollectorRegistry

from kvcache.tokens.tokenizer import Tokenizer
from router.core.flow import FlowPolicy
from router.metrics import Metrics
from router.server.admission import SHED_HEADER, Admission
from tests.router.conftest import until
from tests.router.picker.messages import chosen, parsed, set_headers
from tests.router.picker.support import BOUND, Bench, endpoint

LONG = {"prompt": "One two three " * 4000, "max_tokens": 4}
FULL, FREE = "10.0.0.2", "10.0.0.1"


def busy(tokenizer: Tokenizer, most: int = 100) -> Bench:
    """A picker of two workers, with flow control."""
    bench = Bench(tokenizer, workers=2, fallbacks=0)
    policy = FlowPolicy(max_requests=most)
    bench.picker.admission = Admission(bench.fleet, policy, Metrics(CollectorRegistry()), bench.clock)
    return bench


async def test_a_request_waits_for_a_worker_of_its_subset_though_another_is_free(tokenizer: Tokenizer) -> None:
    bench = busy(tokenizer)
    first, _ = await bench.ask(LONG, subset=FULL)
    first.end()
    waiting = asyncio.create_task(bench.ask(LONG, subset=[FULL]))
    admission = bench.picker.admission
    assert admission is not None
    await until(lambda: bool(admission.flow.waiting))
    assert bench.in_flight() == [0, 1]

    _, replies = await bench.ask(LONG, subset=FREE)  # another one's subset is no reason to wait
    assert chosen(replies) == endpoint(0)

    bench.now += 2.0
    bench.report(1, 0)
    bench.sweep()
    _, replies = await asyncio.wait_for(waiting, BOUND)
    assert chosen(replies) == endpoint(1)
    assert not admission.flow.waiting
    admission.close()


async def test_one_that_may_not_wait_is_turned_away_with_a_reason(tokenizer: Tokenizer) -> None:
    bench = busy(tokenizer, most=1)
    await bench.ask(LONG, subset=FULL)
    waiting = asyncio.create_task(bench.ask(LONG, subset=FULL))
    admission = bench.picker.admission
    assert admission is not None
    await until(lambda: bool(admission.flow.waiting))
    _, replies = await bench.ask(LONG, subset=FULL)
    (reply,) = parsed(replies)
    answer = reply.immediate_response
    assert answer.status.code == 429
    assert orjson.loads(answer.body)["error"]["type"] == "rate_limit_error"
    assert {"retry-after", SHED_HEADER.decode()} <= set_headers(reply).keys()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not admission.flow.waiting
    admission.close()
