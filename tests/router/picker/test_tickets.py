"""What the picker accounts to a worker is released, however a request ends, and soon.

Not covered: what a ticket does to later decisions (tests/router/core).
"""

from __future__ import annotations

import random

import pytest

from kvcache.tokens.tokenizer import Tokenizer
from router.core.unobserved import Ended
from tests.router.picker.messages import response_body, response_headers
from tests.router.picker.support import BOUND, Bench, endpoint, play


@pytest.mark.parametrize("full", [pytest.param(False, id="headers"), pytest.param(True, id="full")])
async def test_no_ticket_is_left_however_requests_end(tokenizer: Tokenizer, full: bool) -> None:
    bench = Bench(tokenizer, full=full)
    await play(bench, 1500, random.Random(7))
    bench.now += 5.0
    for number in range(bench.workers):
        bench.report(number, 0)
    bench.sweep()
    assert (len(bench.unobserved), bench.in_flight(), bench.budget.used) == (0, [0, 0, 0], 0)
    assert bench.released[Ended.BOUND] == 0
    assert bench.released[Ended.REPORT] > 0


async def test_a_whole_answer_is_over_with_its_headers(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1)
    stream, _ = await bench.ask()
    assert bench.in_flight() == [1]
    stream.receive(response_headers(200, endpoint(0), content_type="application/json"))
    assert bench.in_flight() == [0]


async def test_a_stream_is_over_when_the_report_counts_it_no_more(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1)
    for _ in range(3):
        stream, _ = await bench.ask({"prompt": "hi", "stream": True})
        stream.receive(response_headers(200, endpoint(0), content_type="text/event-stream"))
    bench.report(0, 0)  # too early to count them
    bench.sweep()
    assert bench.in_flight() == [3]
    bench.now += 2.0
    bench.report(0, 2)
    bench.sweep()
    assert bench.in_flight() == [2]
    bench.report(0, 0)
    bench.sweep()
    assert (bench.in_flight(), bench.released) == ([0], {Ended.REPORT: 3})


async def test_requests_that_are_followed_do_not_hide_the_end_of_others(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1)
    lost, _ = await bench.ask()
    followed, _ = await bench.ask()
    lost.end()
    bench.now += 2.0
    bench.report(0, 1)
    bench.sweep()
    assert bench.in_flight() == [1]
    followed.end()


async def test_a_worker_that_reports_nothing_is_done_when_predicted(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1)
    stream, _ = await bench.ask()
    stream.end()
    for now in (bench.now + 5.0, bench.now + 30.0):
        bench.now = now
        bench.fleet.expire(now)  # the only report is too old by now
    bench.sweep()
    assert (bench.in_flight(), bench.released) == ([0], {Ended.PREDICTED: 1})


async def test_what_a_worker_reports_for_ever_is_released_at_the_bound(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1)
    stream, _ = await bench.ask()
    stream.end()
    bench.now += BOUND
    bench.report(0, 5)
    bench.sweep()
    assert (bench.in_flight(), bench.released) == ([0], {Ended.BOUND: 1})


async def test_a_request_that_another_worker_answered_is_accounted_there(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=2, strategy="round_robin")
    stream, _ = await bench.ask({"prompt": "hi", "stream": True})
    assert bench.in_flight() == [1, 0]
    stream.receive(response_headers(200, endpoint(1), content_type="text/event-stream"))
    assert bench.in_flight() == [0, 1]
    assert bench.busy == ["http://10.0.0.1:8000"]


async def test_in_full_the_answer_reports_its_tokens_and_its_end(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1, full=True)
    stream, _ = await bench.ask({"prompt": "hi", "stream": True})
    metrics = bench.following.metrics
    stream.receive(response_headers(200, endpoint(0), content_type="text/event-stream"))
    bench.now += 0.25
    stream.receive(response_body(b'data: {"choices":[{"text":"a"}]}\n\n'))
    usage = b'{"prompt_tokens":40,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":16}}'
    stream.receive(response_body(b'data: {"choices":[],"usage":' + usage + b"}\n\ndata: [DONE]\n\n", end=True))
    assert bench.in_flight() == [0]
    assert (metrics.reported_prompt.value, metrics.actual_cached.value) == (40, 16)
    assert bench.released == {Ended.RESPONSE: 1}
