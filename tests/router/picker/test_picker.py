"""Where the picker sends a request: subsets, lists with fallbacks, ranks, stored responses, and what it refuses.

Not covered: the strategies (tests/router/core), the messages (test_stream.py), the accounts (test_tickets.py).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvcache.tokens.tokenizer import Tokenizer
from router.core.outliers import Outcome
from router.picker.endpoints import endpoint_of
from tests.router.picker.messages import NO_HINT, chosen, parsed
from tests.router.picker.support import Bench, endpoint, url_of


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("http://10.0.0.1:8000", "10.0.0.1:8000", id="IPv4"),
        pytest.param("http://[fd00::1]:8000#rank=3", "[fd00::1]:8000", id="a rank at IPv6"),
        pytest.param("http://10.0.0.1", "10.0.0.1:80", id="without a port"),
        pytest.param("http://worker-0:8000", None, id="a name"),
    ],
)
def test_the_endpoint_of_a_worker(url: str, expected: str | None) -> None:
    assert endpoint_of(url) == expected


async def test_the_list_begins_with_the_chosen_and_goes_on_by_cost(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=4, fallbacks=2)
    streams = [await bench.ask({"prompt": "word " * 200 * n}, x_session_id=str(n)) for n in (3, 2, 1)]
    _, replies = await bench.ask()
    listed = chosen(replies).split(",")
    assert len(listed) == len(set(listed)) == 3
    busiest = chosen(streams[0][1]).split(",")[0]
    assert busiest not in listed
    for stream, _ in streams:
        stream.end()


@pytest.mark.parametrize(
    ("hint", "allowed"),
    [
        pytest.param(NO_HINT, {0, 1, 2}, id="none"),
        pytest.param([endpoint(1)], {1}, id="one"),
        pytest.param([endpoint(2), "10.9.9.9:1"], {2}, id="partly known"),
        pytest.param("10.0.0.1,10.0.0.2", {0, 1}, id="addresses"),
        pytest.param(["10.9.9.9:1"], set(), id="unknown"),
        pytest.param([], set(), id="empty"),
        pytest.param(7, set(), id="no list"),
    ],
)
async def test_only_what_the_subset_allows_is_listed(tokenizer: Tokenizer, hint: Any, allowed: set[int]) -> None:
    bench = Bench(tokenizer)
    _, replies = await bench.ask(subset=hint)
    if allowed:
        assert set(chosen(replies).split(",")) == {endpoint(number) for number in allowed}
    else:
        (reply,) = parsed(replies)
        assert reply.immediate_response.status.code == 503
        assert bench.in_flight() == [0, 0, 0]


async def test_in_a_large_fleet_the_list_has_a_fallback_too(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=30)
    _, replies = await bench.ask()
    assert len(chosen(replies).split(",")) == 2


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        pytest.param({"model": "other", "prompt": "hi"}, 404, "`other` does not exist", id="unknown model"),
        pytest.param(["no", "object"], 400, "JSON object", id="no object"),
    ],
)
async def test_what_no_worker_could_serve_is_refused(tokenizer: Tokenizer, fields: Any, status: int, says: str) -> None:
    _, replies = await Bench(tokenizer).ask(fields)
    (reply,) = parsed(replies)
    assert reply.immediate_response.status.code == status
    assert says in json.loads(reply.immediate_response.body)["error"]["message"]


async def test_a_request_without_a_model_goes_to_a_worker(tokenizer: Tokenizer) -> None:
    _, replies = await Bench(tokenizer).ask({"prompt": "hi"})
    assert chosen(replies)


async def test_no_worker_is_ready(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1)
    bench.fleet.mark_unreachable(url_of(0))
    _, replies = await bench.ask()
    (reply,) = parsed(replies)
    assert reply.immediate_response.status.code == 503
    assert json.loads(reply.immediate_response.body)["error"]["type"] == "ServiceUnavailableError"


async def test_a_stored_response_is_asked_of_its_worker(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    _, replies = await bench.ask({"input": "hi", "model": "m"}, path="/v1/responses")
    holder = chosen(replies).split(",")[0]
    name = json.loads(parsed(replies)[0].request_body.response.body_mutation.body)["request_id"]
    for _ in range(3):
        _, replies = await bench.ask(method="GET", path=f"/v1/responses/{name}", end=True)
        assert chosen(replies) == holder


async def test_ejected_workers_are_not_listed(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    for number in (0, 1, 2):
        for _ in range(20):
            bench.fleet.answered(url_of(number), Outcome.GOOD if number else Outcome.BAD, bench.now)
    _, replies = await bench.ask()
    assert endpoint(0) not in chosen(replies)
