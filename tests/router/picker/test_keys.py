"""API keys where a gateway asks: who is let in, what a key counts for, and what it has paid when a request is over.

Not covered: the file and its rotation (tests/router/test_key_file.py), and rates over time
(tests/router/core/test_rates.py). Through a real gateway: tests/envoy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from kvcache.tokens.tokenizer import Tokenizer
from router.core.decision import Caller
from router.picker.dispatched import Dispatched
from router.picker.stream import Refusal, Stream
from router.server.auth import Gate
from router.server.key_file import KeyFile
from tests.router.picker.messages import chosen, parsed, request_headers, response_body, response_headers, set_headers
from tests.router.picker.support import Bench, endpoint

KEY = "sk-0123456789abcdef"
BEARER = {"authorization": f"Bearer {KEY}"}

Gated = Callable[..., Bench]


@pytest.fixture
def gated(tokenizer: Tokenizer, tmp_path: Path) -> Gated:
    """`gated(tenant="a")` makes a picker that knows `KEY`, with these fields."""

    def make(*, full: bool = False, workers: int = 3, **fields: Any) -> Bench:
        path = tmp_path / "keys.json"
        path.write_bytes(orjson.dumps({"keys": [{"key": KEY, "tenant": "team-a", **fields}]}))
        bench = Bench(tokenizer, full=full, workers=workers)
        bench.picker.gate = Gate(KeyFile(path, bench.clock), bench.clock, lambda: 1_800_000_000.0)
        return bench

    return make


def refused(replies: list[bytes]) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of an answer in place of a worker's."""
    (reply,) = parsed(replies)
    answer = reply.immediate_response
    return answer.status.code, orjson.loads(answer.body), set_headers(reply)


@pytest.mark.parametrize(
    ("fields", "headers", "why"),
    [
        pytest.param({}, {}, "missing", id="none"),
        pytest.param({}, {"x_api_key": KEY + "x"}, "unknown", id="unknown"),
        pytest.param({"expires": "2020-01-01T00:00:00Z"}, BEARER, "expired", id="expired"),
    ],
)
async def test_without_a_valid_key_nothing_is_read(
    gated: Gated, fields: dict[str, Any], headers: dict[str, str], why: str
) -> None:
    bench = gated(**fields)
    _, replies = await bench.ask(**headers)
    status, body, added = refused(replies)
    assert (status, added["www-authenticate"]) == (401, "Bearer")
    assert body["error"]["code"] == ("expired_api_key" if why == "expired" else "invalid_api_key")
    assert KEY not in str(body)
    _, replies = await bench.ask(path="/v1/messages", **headers)
    assert refused(replies)[1]["error"]["type"] == "authentication_error"
    assert bench.following.metrics.unauthorized.labels(why)._value.get() == 2
    assert (bench.budget.used, bench.in_flight()) == (0, [0, 0, 0])


async def test_a_browser_s_preflight_needs_no_key(gated: Gated) -> None:
    preflight = {"origin": "https://a.example", "access_control_request_method": "POST"}
    _, replies = await gated().ask(method="OPTIONS", end=True, **preflight)
    assert chosen(replies)


async def test_the_key_says_who_asks_and_stays_here(gated: Gated) -> None:
    bench = gated(priority=7)
    stream, replies = await bench.ask(**BEARER, x_priority="99", x_llm_d_inference_fairness_id="another")
    follower = stream.follower
    assert isinstance(follower, Dispatched)
    assert follower.route.caller == Caller("team-a", 7, "")
    mutation = parsed(replies)[-1].request_body.response.header_mutation
    assert sorted(mutation.remove_headers) == ["authorization", "x-api-key"]


async def test_a_key_s_requests_are_counted(gated: Gated) -> None:
    bench = gated(requests_per_minute=2)
    for left in ("1", "0"):
        stream, _ = await bench.ask(**BEARER)
        (answer,) = parsed(stream.receive(response_headers(200, endpoint(0), content_type="application/json")))
        assert set_headers(answer)["x-ratelimit-remaining-requests"] == left
    _, replies = await bench.ask(**BEARER)
    status, body, added = refused(replies)
    assert (status, body["error"]["code"], added["retry-after"]) == (429, "rate_limit_exceeded", "30")
    bench.now += 31.0
    assert chosen((await bench.ask(**BEARER))[1])


@pytest.mark.parametrize(
    ("ends", "paid"),
    [
        pytest.param("lost", 3, id="not followed: the prompt"),
        pytest.param("error", 0, id="an error"),
        pytest.param("usage", 14, id="what the answer states"),
        pytest.param("nowhere", 0, id="no worker"),
    ],
)
async def test_what_a_key_has_paid(gated: Gated, ends: str, paid: int) -> None:
    bench = gated(full=ends == "usage", workers=0 if ends == "nowhere" else 3, tokens_per_minute=100)
    stream, replies = await bench.ask({"prompt": "One two three", "max_tokens": 4}, **BEARER)
    match ends:
        case "lost":
            stream.end()
        case "error":
            stream.receive(response_headers(400, endpoint(0)))
        case "usage":
            stream.receive(response_headers(200, endpoint(0), content_type="application/json"))
            usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 4}, "choices": [{}]}
            stream.receive(response_body(orjson.dumps(usage), end=True))
        case _:
            assert refused(replies)[0] == 503
    gate = bench.picker.gate
    assert gate is not None
    ((_, limiter),) = gate.file.keys.values()
    assert limiter.tokens is not None
    assert round(100 - limiter.tokens.level(bench.now)) == paid


async def test_a_prompt_beyond_the_rate_is_turned_away(gated: Gated) -> None:
    bench = gated(tokens_per_minute=10)
    asked = {"prompt": "One two three " * 10, "max_tokens": 4}
    first, _ = await bench.ask(asked, **BEARER)
    first.end()
    _, replies = await bench.ask(asked, **BEARER)
    status, body, _ = refused(replies)
    assert (status, body["error"]["type"]) == (429, "tokens")
    assert sum(bench.in_flight()) == 1


def test_headers_are_enough_to_be_refused(gated: Gated) -> None:
    """The body of a request without a key is not waited for."""
    bench = gated()
    stream = Stream(bench.budget)
    assert stream.receive(request_headers()) == []
    with pytest.raises(Refusal):
        bench.picker.admit(stream.request)
