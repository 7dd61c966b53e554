"""The load generator against an HTTP server of the test's own: what it sends, records, and says of itself.

Not covered: whether its times are exact (nothing on a shared machine can be), and a real router (tests/e2e).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import StringIO
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from bench.experiment import Outcome, Run
from bench.loadgen import EndpointError, LoadOptions, drive
from bench.record import ErrorCause
from bench.report import print_comparison, print_result
from bench.result import RunInfo, summarise
from bench.workloads import Workload, WorkloadSpec, build_workload

Handler = Callable[[web.Request], Any]


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


USAGE = {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}
WHOLE = [
    event(choices=[{"text": "a", "finish_reason": None}]),
    event(choices=[{"text": "b", "finish_reason": "length"}]),
    event(choices=[], usage=USAGE),
    b"data: [DONE]\n\n",
]


def streaming(pieces: list[bytes], headers: dict[str, str] | None = None) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse(headers={"content-type": "text/event-stream", **(headers or {})})
        await answer.prepare(request)
        for piece in pieces:
            await answer.write(piece)
        return answer

    return handler


@asynccontextmanager
async def endpoint(handler: Handler) -> AsyncIterator[str]:
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "served"}]})

    app = web.Application()
    for path in ("/v1/completions", "/v1/messages"):
        app.router.add_post(path, handler)
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def small(count: int = 5) -> Workload:
    return build_workload(WorkloadSpec("uniform", limit=count, rate=1000))


def silent(sent: int, answered: int, failed: int) -> None:
    pass


async def test_a_record_holds_what_headers_and_usage_say() -> None:
    headers = {
        "x-kvcluster-worker": "w0",
        "x-kvcluster-reason": "prefix_match",
        "x-kvcluster-matched-blocks": "2",
        "x-kvcluster-strategy": "cache_aware",
    }
    async with endpoint(streaming(WHOLE, headers)) as url:
        driven = await drive(url, small(), LoadOptions(), silent)
    assert driven.strategy == "cache_aware"
    assert [r.index for r in driven.records] == list(range(5))
    for r in driven.records:
        assert (r.worker, r.reason, r.matched_blocks) == ("w0", "prefix_match", 2)
        assert (r.prompt_tokens, r.cached_tokens, r.output_tokens, r.error) == (40, 32, 2, None)
        assert r.first_token is not None
        assert r.finished is not None
        assert r.sent <= r.first_token <= r.finished


async def test_every_request_is_sent_though_none_is_answered_yet() -> None:
    """Open loop: the answers wait until the last request has arrived."""
    waiting = asyncio.Event()
    arrived = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal arrived
        arrived += 1
        if arrived == 80:
            waiting.set()
        await waiting.wait()
        answer: web.StreamResponse = await streaming(WHOLE)(request)
        return answer

    async with endpoint(handler) as url:
        driven = await drive(url, small(80), LoadOptions(), silent)
    assert len(driven.records) == 80
    assert all(r.error is None for r in driven.records)


async def test_the_body_names_the_served_model_and_asks_for_usage() -> None:
    bodies = []

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        answer: web.StreamResponse = await streaming(WHOLE)(request)
        return answer

    async with endpoint(handler) as url:
        await drive(url, small(1), LoadOptions(), silent)
    (body,) = bodies
    assert body["model"] == "served"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["ignore_eos"] is True


MESSAGE = [
    event(type="message_start", message={"usage": {"input_tokens": 40, "output_tokens": 0}}),
    event(type="content_block_start", content_block={"type": "text", "text": ""}, index=0),
    event(type="content_block_delta", delta={"type": "text_delta", "text": "a"}, index=0),
    event(type="content_block_stop", index=0),
    event(
        type="message_delta",
        delta={"stop_reason": "max_tokens"},
        usage={"input_tokens": 8, "output_tokens": 2, "cache_read_input_tokens": 32, "cache_creation_input_tokens": 0},
    ),
    event(type="message_stop"),
]


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        pytest.param(MESSAGE, None, id="whole"),
        pytest.param(MESSAGE[:5], "the stream ended before [DONE]", id="cut off"),
        pytest.param(
            [*MESSAGE[:3], event(type="error", error={"type": "api_error"})], "error event: api_error", id="error"
        ),
    ],
)
async def test_a_stream_of_the_messages_api_is_read(pieces: list[bytes], error: str | None) -> None:
    workload = build_workload(WorkloadSpec("agents", limit=1, api="messages", context=4096))
    async with endpoint(streaming(pieces)) as url:
        (record,) = (await drive(url, workload, LoadOptions(speed=500), silent)).records
    assert (record.error, record.detail) == ((ErrorCause.BROKEN_STREAM, error) if error else (None, ""))
    assert record.first_token is not None
    if error is None:
        assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (40, 32, 2)


async def test_times_are_emulated_seconds() -> None:
    async with endpoint(streaming(WHOLE)) as url:
        driven = await drive(
            url, build_workload(WorkloadSpec("uniform", limit=4, rate=1)), LoadOptions(speed=500), silent
        )
    for r in driven.records:
        assert r.sent >= r.scheduled


@pytest.mark.parametrize(
    ("pieces", "cause", "words"),
    [
        (WHOLE[:3], "broken_stream", "the stream ended before [DONE]"),
        (
            [WHOLE[0], event(error={"type": "InternalServerError"}), WHOLE[3]],
            "broken_stream",
            "error event: InternalServerError",
        ),
        (
            [WHOLE[0], event(choices=[{"text": "", "finish_reason": "abort"}]), WHOLE[3]],
            "broken_stream",
            "finish_reason abort",
        ),
        (WHOLE[2:], "empty", "an answer without content"),
    ],
    ids=["cut off", "error event", "aborted", "without content"],
)
async def test_a_stream_that_ends_badly_is_an_error(pieces: list[bytes], cause: str, words: str) -> None:
    async with endpoint(streaming(pieces)) as url:
        driven = await drive(url, small(1), LoadOptions(), silent)
    assert [(r.error, r.detail) for r in driven.records] == [(cause, words)]


CONTEXT = "This model's maximum context length is 4096 tokens. However, your prompt contains 5000 input tokens."


@pytest.mark.parametrize(
    ("status", "error", "cause", "words"),
    [
        (404, {"type": "NotFoundError"}, "invalid", "HTTP 404 NotFoundError"),
        (400, {"type": "BadRequestError", "message": CONTEXT}, "prompt_too_long", "HTTP 400 BadRequestError"),
        (429, None, "overloaded", "HTTP 429"),
        (503, "no worker", "unavailable", "HTTP 503 no worker"),
        (500, {"message": "boom"}, "server_error", "HTTP 500 boom"),
        (500, {"type": "\x1b[31mred\n"}, "server_error", "HTTP 500 ?[31mred?"),
    ],
    ids=["not found", "prompt too long", "too many", "no worker", "failed", "control characters"],
)
async def test_a_refusal_has_its_cause(status: int, error: object, cause: str, words: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": error}, status=status)

    async with endpoint(handler) as url:
        driven = await drive(url, small(1), LoadOptions(), silent)
    assert [(r.error, r.detail) for r in driven.records] == [(cause, words)]


async def test_a_connection_that_breaks_mid_stream_is_an_error() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(WHOLE[0])
        assert request.transport is not None
        request.transport.abort()
        return answer

    async with endpoint(handler) as url:
        driven = await drive(url, small(1), LoadOptions(), silent)
    (record,) = driven.records
    assert record.error is ErrorCause.CONNECTION
    assert record.detail in ("ClientPayloadError", "ClientOSError", "ServerDisconnectedError", "ConnectionResetError")


async def test_an_answer_that_never_ends_is_given_up() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(WHOLE[0])
        await asyncio.Event().wait()
        return answer

    async with endpoint(handler) as url:
        driven = await drive(url, small(1), LoadOptions(timeout=0.2), silent)
    assert [(r.error, r.detail) for r in driven.records] == [("timeout", "no complete answer within 0.2 s")]


async def test_nobody_listening_is_said_before_the_run() -> None:
    with pytest.raises(EndpointError, match="is the server running"):
        await drive("http://127.0.0.1:9", small(), LoadOptions(), silent)


async def test_the_load_generator_says_when_it_is_the_bottleneck() -> None:
    def slow(sent: int, answered: int, failed: int) -> None:
        deadline = asyncio.get_running_loop().time() + 0.05
        while asyncio.get_running_loop().time() < deadline:
            pass

    async with endpoint(streaming(WHOLE)) as url:
        driven = await drive(url, build_workload(WorkloadSpec("uniform", limit=60, rate=100)), LoadOptions(), slow)
    assert any("late" in why or "behind" in why for why in driven.health.bottleneck)
    assert dataclasses.asdict(driven.health)["lateness_seconds"]["p99"] > 0


async def test_a_result_sums_what_the_answers_report_zeros_and_absent_fields_too() -> None:
    """An answer that does not say how much was cached counts on neither side; comments stand anywhere."""
    details: list[dict[str, Any]] = [
        *({"prompt_tokens_details": {"cached_tokens": 0}} for _ in range(9)),
        {"prompt_tokens_details": {"cached_tokens": 38}},
        {"prompt_tokens_details": None},
        {},
    ]
    coming = iter(details)

    async def handler(request: web.Request) -> web.StreamResponse:
        usage = {"prompt_tokens": 40, "completion_tokens": 2, **next(coming)}
        comment = b": keep-alive\n\n"
        pieces = [comment, *WHOLE[:2], comment * 9, event(choices=[], usage=usage), comment, WHOLE[3], comment * 9]
        answer: web.StreamResponse = await streaming(pieces)(request)
        return answer

    async with endpoint(handler) as url:
        driven = await drive(url, small(len(details)), LoadOptions(), silent)
    result = summarise(driven.records, RunInfo("any", 0, {}))
    assert result.errors == 0
    assert result.hit_rate == 38 / 400
    assert result.computed_tokens == 362
    assert (result.hit.requests, result.miss.requests) == (1, 9)
    console = Console(file=StringIO(), width=200)
    print_result(console, result)
    print_comparison(console, [Outcome("any", [Run("any", 0, None, result)])])
    assert console.file.getvalue().count("9.5%") == 2  # type: ignore[attr-defined]
