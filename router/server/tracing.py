"""One trace for each request that the sampler wants, with OpenTelemetry: spans for the request and what it waits for.

    POST /v1/chat/completions   from arrival to the end of the answer
      read                      the body is parsed and tokenized
      decide                    a worker is chosen; once for each attempt
      attempt                   the request is with a worker, which gets this span as its parent; once for each attempt
        first token             until the first event of a stream with content
      stream                    the rest of a stream

Spans follow the semantic conventions for HTTP and generative AI; what these do not name begins with `kvcluster.`. No
span holds text of a prompt or an answer, or any header. docs/tracing.md lists the attributes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.propagate import get_global_textmap
from opentelemetry.propagators.textmap import Getter, Setter, TextMapPropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
)
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from starlette.types import Scope

from router.core.decision import Decision
from router.core.retries import FailureCause
from router.server.headers import find
from router.server.prompts import COMPLETIONS, PROMPTED
from router.server.record import Attempt, RequestRecord, stated
from runtime.http.context import Headers

BAGGAGE = "baggage"
Attributes = dict[str, Any]


class _Headers(Getter[Headers], Setter[Headers]):
    """Headers as ASGI has them."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        name = key.lower().encode()
        values = [value.decode("latin-1") for at, value in carrier if at.lower() == name]
        return values or None

    def keys(self, carrier: Headers) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]

    def set(self, carrier: Headers, key: str, value: str) -> None:
        carrier.append((key.lower().encode(), value.encode("latin-1", "replace")))


_HEADERS = _Headers()


class Tracing:
    """Begins the traces of requests, or continues those of their clients. `provider` samples and exports; its exporter
    runs in a thread of its own."""

    def __init__(self, provider: TracerProvider, propagator: TextMapPropagator | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("kvcluster.router")
        self._propagator = propagator or get_global_textmap()

    def begin(self, record: RequestRecord, scope: Scope) -> RequestTrace:
        """The trace of a request that has arrived."""
        return RequestTrace(self, record, scope)

    def extract(self, headers: Headers) -> Context:
        """The context that a client states."""
        return self._propagator.extract(headers, Context(), _HEADERS)

    def with_context(self, headers: Headers, context: Context) -> Headers:
        """The headers with this context in place of the client's."""
        stated: Headers = []
        self._propagator.inject(stated, context, _HEADERS)
        replaced = {name.encode() for name in self._propagator.fields if name != BAGGAGE}
        replaced |= {name for name, _ in stated}
        return [*(header for header in headers if header[0] not in replaced), *stated]

    def span(self, name: str, context: Context, kind: SpanKind, at: int, attributes: Mapping[str, Any]) -> Span:
        """A span that begins at `at`, nanoseconds since 1970."""
        return self._tracer.start_span(name, context, kind, attributes, start_time=at)

    async def close(self, timeout: float) -> None:
        """Export what is left, within so many seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, timeout)


class RequestTrace:
    """The spans of one request. What is told here as it happens is what workers must know; the rest is made at the end
    from the request's record."""

    __slots__ = ("_arrived", "_attempt", "_began", "_client", "_context", "_spans", "_tracing", "span")

    def __init__(self, tracing: Tracing, record: RequestRecord, scope: Scope) -> None:
        self._tracing = tracing
        self._began, self._arrived = time.time_ns(), record.arrived
        self._client = tracing.extract(scope["headers"])
        self.span = tracing.span(record.method, self._client, SpanKind.SERVER, self._began, _request(record, scope))
        self._context = set_span_in_context(self.span, self._client)
        self._attempt: Span | None = None
        self._spans: list[Span] = []

    def _at(self, at: float) -> int:
        """A time of the router's clock in nanoseconds since 1970."""
        return self._began + int((at - self._arrived) * 1e9)

    def attempt(self, decision: Decision, number: int, at: float) -> None:
        """The request goes to a worker, for the `number`-th time from 0 on."""
        if not self.span.is_recording():
            return
        attributes = _worker(decision)
        if number:
            attributes[http_attributes.HTTP_REQUEST_RESEND_COUNT] = number
        self._attempt = self._tracing.span("attempt", self._context, SpanKind.CLIENT, self._at(at), attributes)
        self._spans.append(self._attempt)

    def outgoing(self, headers: Headers) -> Headers:
        """The headers that the worker gets in the present attempt."""
        context = self._context if self._attempt is None else set_span_in_context(self._attempt, self._client)
        return self._tracing.with_context(headers, context)

    def attempt_ended(self, cause: FailureCause | None, at: float) -> None:
        """The present attempt is over."""
        if self._attempt is not None:
            if cause is not None:
                _fail(self._attempt, cause.value)
            self._attempt.end(self._at(at))

    def end(self, record: RequestRecord) -> None:
        """The request is over."""
        if self.span.is_recording():
            self._phases(record)
            self._finish(record)
        self.span.end(self._at(record.ended))

    def _phases(self, record: RequestRecord) -> None:
        attempts = record.attempts
        if record.choosing_at:
            first = attempts[0].choosing_at if attempts else record.choosing_at
            unread = record.route.unread if record.route is not None else None
            self._child("read", record.arrived, first, {"kvcluster.unread": unread.value} if unread else {})
        for attempt, span in zip(attempts, self._spans, strict=True):
            self._child("decide", attempt.choosing_at, attempt.sent_at, _decision(attempt, record))
            at, end = record.first_token_at, attempt.ended_at
            if at is not None and end is not None and attempt.sent_at <= at <= end:
                self._child("first token", attempt.sent_at, at, {}, set_span_in_context(span, self._client))
        if record.choosing_at and (not attempts or record.choosing_at > attempts[-1].choosing_at):
            self._child("decide", record.choosing_at, record.ended, {error_attributes.ERROR_TYPE: "no_worker"})
        if record.first_token_at is not None:
            self._child("stream", record.first_token_at, record.ended, {"kvcluster.bytes": record.sent_bytes})

    def _child(
        self,
        name: str,
        begin: float,
        end: float,
        attributes: Attributes,
        context: Context | None = None,
    ) -> Span:
        span = self._tracing.span(name, context or self._context, SpanKind.INTERNAL, self._at(begin), attributes)
        span.end(self._at(end))
        return span

    def _finish(self, record: RequestRecord) -> None:
        span = self.span
        if record.route is not None:
            route = _route(record.path)
            span.update_name(f"{record.method} {route}")
            span.set_attribute(http_attributes.HTTP_ROUTE, route)
        span.set_attributes(_answer(record))
        if record.cause is not None:
            _fail(span, record.cause.value)
        elif record.answer_status >= 500:
            _fail(span, str(record.answer_status))


def _route(path: str) -> str:
    """The path without what names one of many things (a response, a file): names of spans must be few."""
    return path if path in PROMPTED else "/".join(path.split("/")[:3])


def _fail(span: Span, kind: str) -> None:
    span.set_attribute(error_attributes.ERROR_TYPE, kind)
    span.set_status(Status(StatusCode.ERROR))


def _request(record: RequestRecord, scope: Scope) -> Attributes:
    """What is known of a request when it arrives, and a sampler may go by."""
    attributes: Attributes = {
        http_attributes.HTTP_REQUEST_METHOD: record.method,
        url_attributes.URL_PATH: stated(record.path),
        url_attributes.URL_SCHEME: scope["scheme"],
        network_attributes.NETWORK_PROTOCOL_VERSION: scope["http_version"],
    }
    if client := scope.get("client"):
        attributes[client_attributes.CLIENT_ADDRESS] = client[0]
    if host := find(scope["headers"], b"host"):
        attributes |= _server(f"//{host.decode('latin-1')}")
    return attributes


def _server(url: str) -> Attributes:
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:  # what a client states as its host need not be one
        return {}
    attributes: Attributes = {server_attributes.SERVER_ADDRESS: name} if name else {}
    return {**attributes, server_attributes.SERVER_PORT: port} if port is not None else attributes


def _worker(decision: Decision) -> Attributes:
    return {"kvcluster.worker": decision.worker_id, **_server(decision.url)}


def _decision(attempt: Attempt, record: RequestRecord) -> Attributes:
    decision = attempt.decision
    attributes: Attributes = {
        "kvcluster.worker": decision.worker_id,
        "kvcluster.strategy": decision.strategy,
        "kvcluster.reason": decision.reason.value,
        "kvcluster.candidates": len(decision.candidates),
    }
    if record.route is not None and record.route.prompted:
        attributes |= {
            "kvcluster.matched_blocks": decision.matched_blocks,
            "kvcluster.prompt_blocks": decision.prompt_blocks,
            "kvcluster.predicted_ttft_seconds": decision.predicted_ttft,
        }
    return attributes


def _answer(record: RequestRecord) -> Attributes:
    route, usage = record.route, record.usage
    attributes: Attributes = {
        "kvcluster.request_id": stated(record.request_id.decode("latin-1")),
        "kvcluster.attempts": len(record.attempts),
        http_attributes.HTTP_RESPONSE_STATUS_CODE: record.answer_status or None,
        "kvcluster.client_left": True if record.left else None,
    }
    if route is not None:
        attributes |= {gen_ai.GEN_AI_REQUEST_MODEL: stated(route.model) if route.model is not None else None}
        if route.prompted:
            attributes |= {
                gen_ai.GEN_AI_OPERATION_NAME: "text_completion" if record.path == COMPLETIONS else "chat",
                gen_ai.GEN_AI_REQUEST_MAX_TOKENS: route.output_tokens,
                gen_ai.GEN_AI_REQUEST_STREAM: route.streaming,
                gen_ai.GEN_AI_USAGE_INPUT_TOKENS: route.prompt_tokens,
            }
    if usage is not None:
        attributes |= {
            gen_ai.GEN_AI_USAGE_INPUT_TOKENS: usage.prompt,
            gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: usage.completion,
            gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: usage.cached,
        }
    if record.first_token_at is not None:
        attributes[gen_ai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] = record.first_token_at - record.arrived
    if record.attempts:
        last = record.attempts[-1]
        attributes |= {"kvcluster.worker": last.decision.worker_id, "kvcluster.reason": last.decision.reason.value}
        if route is not None and route.prompted:
            attributes |= {
                "kvcluster.predicted_ttft_seconds": last.decision.predicted_ttft,
                "kvcluster.predicted_cached_blocks": last.decision.reported_blocks,
            }
    return {name: value for name, value in attributes.items() if value is not None}
