"""Traces: a collector gets the spans of each request, and workers and clients share one trace with them.

Covered: the tree of spans and their times, attributes, retries, broken streams, requests that no worker answers,
contexts of clients, samplers, the variables `OTEL_*`, a collector that does not answer, the end of the process.
Not covered: what an engine makes of the context.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from router.server.tracing_setup import exporters, make_tracing
from runtime.settings import SettingsError
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.fakes import DONE, Connection, FakeWorker, Received, fake_workers, good, good_after, token, usage
from tests.router.otlp import Collector, attributes, collecting

SECRET = "quick brown fox"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE}-b7ad6b7169203331-01"

Traced = Callable[..., AbstractAsyncContextManager[tuple[RunningRouter, Collector]]]


@pytest.fixture
def traced(start_router: StartRouter, monkeypatch: pytest.MonkeyPatch) -> Traced:
    """`async with traced(workers) as (router, collector)`: once it is left, the collector has all spans."""

    @asynccontextmanager
    async def start(
        workers: list[FakeWorker], environ: dict[str, str] | None = None, **settings: Any
    ) -> AsyncIterator[tuple[RunningRouter, Collector]]:
        async with collecting() as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            for name, value in (environ or {}).items():
                monkeypatch.setenv(name, value)
            async with start_router(workers, tracing=make_tracing(), **settings) as router:
                yield router, collector

    return start


async def streams(connection: Connection, request: Received) -> None:
    await connection.begin_stream()
    await connection.chunk(token("a"))
    await connection.chunk(token("b", "stop") + usage(32) + DONE)
    await connection.end_stream()


async def fails(connection: Connection, request: Received) -> None:
    connection.reset()


def parent_of(request: Received) -> tuple[str, str, bool]:
    """Trace and span that a worker was sent, and whether they are sampled."""
    version, trace, span, flags = (request.header("traceparent") or "").split("-")
    assert version == "00"
    return trace, span, bool(int(flags, 16) & 1)


def is_within(span: Span, parent: Span) -> bool:
    return (
        parent.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= parent.end_time_unix_nano
    )


async def test_the_spans_of_a_request(traced: Traced) -> None:
    prompt = list(range(100))
    before = time.time_ns()
    async with fake_workers(streams) as workers, traced(workers) as (router, collector):
        body = {"prompt": prompt, "stream": True, "max_tokens": 7, "model": "m", "user": SECRET}
        headers = {"x-request-id": "mine", "authorization": f"Bearer {SECRET}", "user-agent": SECRET}
        answer = await router.client.post(f"/v1/completions?key={SECRET}", json=body, headers=headers)
    (request,) = collector.named("POST /v1/completions")
    assert collector.children(request) == ["read", "decide", "attempt", "stream"]
    (attempt,) = collector.named("attempt")
    assert collector.children(attempt) == ["first token"]
    assert {span.trace_id for span in collector.spans} == {request.trace_id}
    spans = {span.span_id: span for span in collector.spans}
    assert all(is_within(span, spans[span.parent_span_id]) for span in collector.spans if span.parent_span_id)
    assert before <= request.start_time_unix_nano <= request.end_time_unix_nano <= time.time_ns()
    starts = [collector.named(name)[0].start_time_unix_nano for name in ("read", "decide", "attempt", "stream")]
    assert starts == sorted(starts)
    assert (request.kind, attempt.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert request.status.code == Status.STATUS_CODE_UNSET
    (received,) = workers[0].received
    assert parent_of(received) == (request.trace_id.hex(), attempt.span_id.hex(), True)

    stated = attributes(request.attributes)
    ttft = stated.pop("gen_ai.response.time_to_first_chunk")
    predicted = stated.pop("kvcluster.predicted_ttft_seconds")
    assert ttft == pytest.approx(
        (collector.named("stream")[0].start_time_unix_nano - request.start_time_unix_nano) / 1e9, abs=1e-5
    )
    assert predicted > 0
    assert stated == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "client.address": "127.0.0.1",
        "server.address": "127.0.0.1",
        "server.port": router.data.port,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 32,
        "kvcluster.request_id": "mine",
        "kvcluster.attempts": 1,
        "kvcluster.worker": workers[0].url,
        "kvcluster.reason": "only_candidate",
        "kvcluster.predicted_cached_blocks": 0,
    }
    assert attributes(attempt.attributes) == {
        "kvcluster.worker": workers[0].url,
        "server.address": "127.0.0.1",
        "server.port": workers[0].port,
    }
    decided = attributes(collector.named("decide")[0].attributes)
    assert decided.pop("kvcluster.predicted_ttft_seconds") == predicted
    assert decided == {
        "kvcluster.worker": workers[0].url,
        "kvcluster.strategy": "round_robin",
        "kvcluster.reason": "only_candidate",
        "kvcluster.candidates": 1,
        "kvcluster.matched_blocks": 0,
        "kvcluster.prompt_blocks": 7,
    }
    assert attributes(collector.named("stream")[0].attributes) == {"kvcluster.bytes": len(answer.content)}
    (resource,) = collector.resources
    assert resource["service.name"] == "kvcluster-router"
    assert SECRET.encode() not in collector.raw


async def test_each_attempt_has_a_span_and_its_cause(traced: Traced) -> None:
    async with fake_workers(fails, streams) as workers, traced(workers) as (router, collector):
        await router.stream()
    (request,) = collector.named("POST /v1/completions")
    assert collector.children(request) == ["read", "decide", "attempt", "decide", "attempt", "stream"]
    first, second = collector.named("attempt")
    assert first.end_time_unix_nano <= second.start_time_unix_nano
    assert [attributes(span.attributes).get("error.type") for span in (first, second)] == ["broken", None]
    assert [attributes(span.attributes).get("http.request.resend_count") for span in (first, second)] == [None, 1]
    assert [span.status.code for span in (first, second, request)] == [
        Status.STATUS_CODE_ERROR,
        Status.STATUS_CODE_UNSET,
        Status.STATUS_CODE_UNSET,
    ]
    assert (collector.children(first), collector.children(second)) == ([], ["first token"])
    spans = [parent_of(worker.received[0])[1] for worker in workers]
    assert spans == [first.span_id.hex(), second.span_id.hex()]


async def test_a_broken_stream_is_an_error_of_its_attempt_and_its_request(traced: Traced) -> None:
    async def breaks(connection: Connection, request: Received) -> None:
        await connection.begin_stream()
        await connection.chunk(token("a"))
        await sent.wait()
        connection.reset()

    sent = asyncio.Event()
    async with fake_workers(breaks) as workers, traced(workers, eject_after=0) as (router, collector):
        body = {"prompt": "x", "stream": True}
        async with router.client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_raw():
                sent.set()
    (request,) = collector.named("POST /v1/completions")
    assert collector.children(request) == ["read", "decide", "attempt", "stream"]
    for span in (request, *collector.named("attempt")):
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert attributes(span.attributes)["error.type"] == "broken"
    assert attributes(request.attributes)["http.response.status_code"] == 200


async def test_a_request_that_no_worker_answers(traced: Traced) -> None:
    async with fake_workers(fails) as workers, traced(workers, retry_attempts=1) as (router, collector):
        assert (await router.complete()).status_code == 503
        router.router.fleet.remove(workers[0].url)
        assert (await router.complete()).status_code == 503
    failed, unserved = collector.named("POST /v1/completions")
    assert collector.children(failed) == ["read", "decide", "attempt"]
    assert collector.children(unserved) == ["read", "decide"]
    for span in (failed, unserved):
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert attributes(span.attributes)["error.type"] == "503"
    assert attributes(collector.named("decide")[1].attributes) == {"error.type": "no_worker"}


async def test_requests_that_reach_no_worker_have_one_span(traced: Traced) -> None:
    async with fake_workers(good) as workers, traced(workers) as (router, collector):
        await router.client.get("/nothing/" + SECRET.replace(" ", "-"))
    (span,) = collector.spans
    assert span.name == "GET", "a name must not be what a client makes up"
    assert attributes(span.attributes)["http.response.status_code"] == 404
    assert "http.route" not in attributes(span.attributes)


async def test_a_span_is_not_called_after_one_of_many_things(traced: Traced) -> None:
    async with fake_workers(good) as workers, traced(workers) as (router, collector):
        await router.client.get("/v1/files/file-123/content")
    (span,) = (span for span in collector.spans if not span.parent_span_id)
    stated = attributes(span.attributes)
    assert (span.name, stated["http.route"]) == ("GET /v1/files", "/v1/files")
    assert stated["url.path"] == "/v1/files/file-123/content"


async def test_a_client_that_leaves_is_no_error(traced: Traced) -> None:
    never = asyncio.Event()
    async with fake_workers(good_after(never)) as workers, traced(workers) as (router, collector):
        await router.leave_once(lambda: len(workers[0].received) == 1)
        await until(router.nothing_held)
    (request,) = collector.named("POST /v1/completions")
    assert request.status.code == Status.STATUS_CODE_UNSET
    stated = attributes(request.attributes)
    assert stated["kvcluster.client_left"] is True
    assert "http.response.status_code" not in stated


# --- contexts and sampling ---


async def test_a_clients_trace_goes_on_through_the_router_to_the_worker(traced: Traced) -> None:
    async with fake_workers(good) as workers, traced(workers) as (router, collector):
        headers = {"traceparent": CALLER, "tracestate": "a=1,b=2", "baggage": "tenant=x"}
        await router.client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    (request,) = collector.named("POST /v1/completions")
    (attempt,) = collector.named("attempt")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, "b7ad6b7169203331")
    (received,) = workers[0].received
    assert parent_of(received) == (TRACE, attempt.span_id.hex(), True)
    assert (received.header("tracestate"), received.header("baggage")) == ("a=1,b=2", "tenant=x")
    assert [name for name, _ in received.headers].count("traceparent") == 1


@pytest.mark.parametrize(
    ("environ", "context"),
    [
        pytest.param({}, CALLER[:-1] + "0", id="the client's trace is not sampled"),
        pytest.param({"OTEL_TRACES_SAMPLER": "always_off"}, CALLER, id="the sampler wants none"),
        pytest.param(
            {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, None, id="share of 0"
        ),
    ],
)
async def test_what_is_not_sampled_is_not_exported_and_workers_learn_it(
    traced: Traced, environ: dict[str, str], context: str | None
) -> None:
    async with fake_workers(good) as workers, traced(workers, environ) as (router, collector):
        headers = {"traceparent": context} if context else {}
        await router.client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert collector.spans == []
    (received,) = workers[0].received
    trace, _, sampled = parent_of(received)
    assert not sampled
    assert context is None or trace == TRACE


async def test_without_tracing_a_clients_context_passes_unchanged(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        headers = {"traceparent": CALLER, "tracestate": "a=1", "baggage": "tenant=x"}
        await router.client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        await router.complete()
    first, second = workers[0].received
    assert {name: first.header(name) for name in headers} == headers
    assert second.header("traceparent") is None


async def test_a_context_that_makes_no_sense_begins_a_new_trace(traced: Traced) -> None:
    async with fake_workers(good) as workers, traced(workers) as (router, collector):
        headers = {"traceparent": "00-" + "0" * 32 + "-nonsense-01", "tracestate": "a=1", "host": "[no host"}
        await router.client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    (request,) = collector.named("POST /v1/completions")
    assert request.parent_span_id == b""
    (received,) = workers[0].received
    assert parent_of(received)[0] == request.trace_id.hex()
    assert received.header("tracestate") is None


@pytest.mark.parametrize(
    "baggage", [pytest.param(f"key={SECRET}", id="not valid"), pytest.param(f"key={'x' * 9000}", id="too long")]
)
async def test_baggage_that_cannot_be_taken_is_not_logged(
    traced: Traced, caplog: pytest.LogCaptureFixture, baggage: str
) -> None:
    async with fake_workers(good) as workers, traced(workers) as (router, _):
        answer = await router.client.post("/v1/completions", json={"prompt": "x"}, headers={"baggage": baggage})
    assert answer.status_code == 200
    assert baggage[4:20] not in caplog.text


# --- what the environment says ---


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        pytest.param({}, [], id="nothing"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ["otlp_proto_http"], id="endpoint"),
        pytest.param({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}, ["otlp_proto_http"], id="traces endpoint"),
        pytest.param({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["console", "otlp_proto_http"], id="named"),
        pytest.param(
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"], id="gRPC"
        ),
        pytest.param({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, [], id="none"),
        pytest.param({"OTEL_SDK_DISABLED": "TRUE", "OTEL_TRACES_EXPORTER": "otlp"}, [], id="disabled"),
    ],
)
def test_the_variables_name_the_exporters(environ: dict[str, str], names: list[str]) -> None:
    assert exporters(environ) == names


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        pytest.param({"OTEL_TRACES_EXPORTER": "jaeger"}, "'jaeger', which is not installed: install", id="exporter"),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json' is not supported; use http/protobuf or grpc",
            id="protocol",
        ),
    ],
)
def test_what_cannot_be_served_ends_the_process_in_words(environ: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make_tracing(environ)


def test_without_opentelemetry_a_router_says_so_and_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert make_tracing({"OTEL_TRACES_EXPORTER": "otlp"}) is None
    (record,) = caplog.records
    assert "pip install 'kvcluster[otel]'" in vars(record)["kvcluster_fields"]["why"]


async def test_the_service_is_called_as_the_environment_says(traced: Traced) -> None:
    environ = {"OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    async with fake_workers(good) as workers, traced(workers, environ) as (router, collector):
        await router.complete()
    (resource,) = collector.resources
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("mine", "test")
    assert resource["service.version"] == importlib.metadata.version("kvcluster")


async def test_a_collector_that_does_not_answer_delays_no_request_and_no_end(
    start_router: StartRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.assembly.TRACING_CLOSE", 0.1)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    async with fake_workers(good, good) as (worker, silent):
        silent.frozen.set()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", silent.url)
        async with start_router([worker], tracing=make_tracing()) as router:
            for _ in range(20):
                assert (await router.complete()).status_code == 200
