"""What an answer that is passed on teaches the router: how fast its engine is, and which figures count.

Covered: the conditions under which an answer's time and its usage are used, and what is counted of them. Not covered:
what the ticket and the latency correction make of them (tests/router/core), sums over many answers (test_figures.py),
what is passed on (test_streams.py, test_dataplane.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry

from kvcache.keys import PrefixKeys
from router.core.decision import CacheUse, Decision, DecisionReason, ReportedSequence, RouteRequest
from router.metrics import Metrics, by_label
from router.server.client_answer import ClientAnswer
from router.server.relay import MAX_CLIENT_SHARE, Client, Relay
from router.upstream.in_flight import NOT_WAITING, InFlight, InFlightRequest, RequestState, UpstreamTimeouts
from router.upstream.interface import Sink, UpstreamRequest
from tests.router.fakes import DONE, token, usage

KEYS = PrefixKeys(b"", 16)
URL = "http://w:1"
DECISION = Decision(
    worker_id="w",
    url=URL,
    strategy="cache_aware",
    reason=DecisionReason.PREFIX_MATCH,
    matched_blocks=2,
    prompt_blocks=7,
    predicted_ttft=0.5,
    queue_seconds=0.0,
    prefill_seconds=0.5,
    candidates=(),
    best_blocks=2,
    reported_blocks=2,
)
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
STREAM = token("a") + token("b", "stop") + usage(32) + DONE


def whole(choices: int = 1, finish: str = "stop") -> bytes:
    details = {"prompt_tokens": 100, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}
    return orjson.dumps({"choices": [{"text": "ab", "finish_reason": finish}] * choices, "usage": details})


@dataclass
class NotedTicket:
    """Notes what it is told."""

    served: bool = False
    first: list[float] = field(default_factory=list)
    costs: list[tuple[float, Any]] = field(default_factory=list)
    usages: list[tuple[int, int]] = field(default_factory=list)

    def first_token(self, now: float) -> None:
        self.first.append(now)

    def reported(self, prompt_tokens: int, cached_tokens: int, now: float) -> float:
        self.usages.append((prompt_tokens, cached_tokens))
        return cached_tokens / 1000

    def finished(self, now: float, cost: Any) -> None:
        self.costs.append((now, cost))


@dataclass
class Response:
    """An answer whose pieces take `each` seconds."""

    pieces: list[bytes]
    clock: list[float]
    each: float = 1.0
    status: int = 200
    content_type: bytes = b"text/event-stream"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"content-type", self.content_type)]

    async def read(self) -> bytes:
        self.clock[0] += self.each
        return self.pieces.pop(0) if self.pieces else b""

    async def pass_on(self, sink: Sink) -> bool:
        while self.pieces:
            if not sink(await self.read()):
                return False
        self.clock[0] += self.each
        return True

    def close(self) -> None:
        return


async def relayed(
    pieces: Sequence[bytes],
    *,
    status: int = 200,
    client_seconds: float = 0.0,
    reported: ReportedSequence | None = None,
    stream: bool = True,
) -> tuple[NotedTicket, Metrics]:
    """Pass an answer on to a client that takes so long to read each piece."""
    clock, ticket, metrics = [0.0], NotedTicket(), Metrics(CollectorRegistry())
    task = asyncio.current_task()
    assert task is not None

    class Writer:
        """A client that takes `client_seconds` to read a piece."""

        async def drain(self) -> None:
            assert request.waiting_since == NOT_WAITING, "the client's time is not the worker's silence"
            clock[0] += client_seconds

        def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
            pass

        def write(self, data: bytes, *, last: bool = False) -> bool:
            return client_seconds == 0.0

    request = InFlightRequest(task)
    timeouts = UpstreamTimeouts(answer=1e9, idle=1e9, stall=1e9, cut=1e9)
    with InFlight(timeouts).at(URL, request, 0.0):
        relay = Relay(
            Client(RouteRequest(KEYS, 100, stream, reported=reported), b"id", 0.0, ClientAnswer(Writer())),
            UpstreamRequest("POST", "/v1/completions", [], b"{}"),
            request,
            DECISION,
            Response(list(pieces), clock, status=status, content_type=b"text/event-stream" if stream else b"a/json"),
            ticket,  # type: ignore[arg-type]
            metrics,
            lambda: clock[0],
            16,
            1,
        )
        assert await relay.run(None) is None
    assert request.state is RequestState.COMPLETE
    return ticket, metrics


def counted(metrics: Metrics) -> tuple[float, float, float]:
    """(predicted cached, reported prompt, actual cached) tokens."""
    counters = (metrics.predicted_cached, metrics.reported_prompt, metrics.actual_cached)
    predicted, prompt, actual = (next(iter(counter.collect())).samples[0].value for counter in counters)
    return predicted, prompt, actual


@pytest.mark.parametrize("stream", [pytest.param(True, id="stream"), pytest.param(False, id="whole")])
async def test_a_complete_answer_teaches_its_time_and_its_tokens(stream: bool) -> None:
    ticket, metrics = await relayed([STREAM] if stream else [whole()], stream=stream)
    ((at, cost),) = ticket.costs
    assert (at, tuple(cost)) == (1.0 if stream else 2.0, (100, 2, 32)), "a whole answer ends with its last read"
    assert ticket.served
    assert ticket.first == ([1.0] if stream else [])
    assert counted(metrics) == (32, 100, 32)


@pytest.mark.parametrize(
    ("share", "learns"), [pytest.param(0.5, True, id="quick client"), pytest.param(2.0, False, id="slow client")]
)
async def test_time_that_a_slow_client_took_is_not_the_engines(share: float, learns: bool) -> None:
    pieces = [token("a"), token("b")] * 10 + [usage(32) + DONE]
    ticket, metrics = await relayed(pieces, client_seconds=share * MAX_CLIENT_SHARE)
    assert bool(ticket.costs) is learns
    assert counted(metrics) == (32, 100, 32)


async def test_the_time_of_several_sequences_is_not_that_of_one() -> None:
    sequence = ReportedSequence(KEYS, 2, 0)
    ticket, metrics = await relayed([STREAM], reported=sequence)
    assert ticket.costs == []
    assert counted(metrics) == (32, 100, 32)
    ticket, _ = await relayed([whole(choices=2)], stream=False)
    assert ticket.costs == []


@pytest.mark.parametrize(
    ("end", "tokens"),
    [
        pytest.param(usage(32, completion=9) + DONE, 9, id="by the usage"),
        pytest.param(DONE, 4, id="by the events"),
    ],
)
async def test_the_time_of_a_token_is_that_after_the_first(end: bytes, tokens: int) -> None:
    _, metrics = await relayed([ROLE + token("a"), token("b"), token("c") + token("d", "stop"), end])
    # A piece a second: the first token comes with the first piece, the end with the fourth.
    assert (metrics.tpot.count, metrics.tpot.sum) == (1, pytest.approx(3.0 / (tokens - 1)))


async def test_one_token_has_no_time_between_tokens() -> None:
    _, metrics = await relayed([token("a", "stop"), usage(32, completion=1) + DONE])
    assert (metrics.tpot.count, metrics.ttft[CacheUse.PARTIAL].count) == (0, 1)


@pytest.mark.parametrize(
    ("cached", "off"),
    [
        pytest.param(32, {}, id="as predicted"),
        pytest.param(80, {"under": 48}, id="more"),
        pytest.param(0, {"over": 32}, id="nothing"),
        pytest.param(None, {}, id="not said"),
    ],
)
async def test_predictions_are_compared_with_what_the_answer_reports(cached: int | None, off: dict[str, int]) -> None:
    end = DONE if cached is None else usage(cached) + DONE
    ticket, metrics = await relayed([token("a") + token("b", "stop"), end])
    assert metrics.ttft[CacheUse.PARTIAL].sum == 1.0
    assert metrics.ttft_ratio.sum == pytest.approx(1.0 / DECISION.predicted_ttft)
    assert by_label(metrics.mispredicted_cached) == {"over": 0, "under": 0, **off}
    assert ticket.usages == ([] if cached is None else [(100, cached)])


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_refusal_counts_no_tokens_and_leaves_nothing_cached(status: int) -> None:
    ticket, metrics = await relayed([whole()], status=status, stream=False)
    assert not ticket.served
    assert counted(metrics) == (0, 0, 0)
