"""The endpoint picker as a real Envoy asks it: what reaches the workers, and what the client gets.

Not covered: every message that a gateway might send (tests/router/picker), and the times that it takes (bench.micro).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.envoy.conftest import Behind, StartGateway
from tests.envoy.gateway import Modes
from tests.processes import eventually, free_port
from tests.router.fakes import fake_workers, good, good_after

pytestmark = pytest.mark.envoy

DUPLEX = Modes()
BUFFERED = Modes(request_body="BUFFERED", response_body="NONE")


async def ends(behind: Behind) -> None:
    """Wait until no request is accounted to a worker."""
    await eventually(behind.router.nothing_held, "every ticket is released")


@pytest.mark.parametrize("modes", [pytest.param(DUPLEX, id="full duplex"), pytest.param(BUFFERED, id="buffered")])
async def test_requests_reach_workers_as_they_are(start_gateway: StartGateway, modes: Modes) -> None:
    async with fake_workers(good, good) as workers, start_gateway(workers, modes) as behind:
        client = behind.gateway.client
        assert (await client.get("/v1/models")).status_code == 200
        long = json.dumps({"prompt": "Hi", "max_tokens": 2, "user": "x" * 200_000}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(long), 50_001):
                yield long[at : at + 50_001]
                await asyncio.sleep(0)

        for content in (long, pieces()):
            answer = await client.post("/v1/completions", content=content)
            assert answer.status_code == 200, answer.text
        streamed = await behind.complete(stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n")
        received = [each for worker in workers for each in worker.received]
        assert [each.body for each in received if len(each.body) > 1000] == [long, long]
        assert all(each.header("x-request-id") for each in received)
        refused = await client.post("/v1/completions", content=b"{no json")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
        assert (await client.post("/v1/messages", content=b"[]")).json()["type"] == "error"
        await ends(behind)
        assert len([each for worker in workers for each in worker.received]) == 4
        # In full duplex nobody sees how a worker answers.
        answered = 0 if modes is DUPLEX else 4
        assert behind.router.metric("requests_total", code="200") == answered
        assert behind.router.metric("requests_total", code="400") == 2


async def test_a_dead_first_endpoint_costs_the_client_nothing(start_gateway: StartGateway) -> None:
    async with fake_workers(good, good) as workers, start_gateway(workers, DUPLEX) as behind:
        dead, alive = workers
        await dead.stop()
        for _ in range(4):
            answer = await behind.complete()
            assert answer.status_code == 200, answer.text
        assert len(alive.received) == 4
        await ends(behind)


async def test_in_full_the_whole_answer_is_followed(start_gateway: StartGateway) -> None:
    async with (
        fake_workers(good) as workers,
        start_gateway(workers, DUPLEX, response_processing="full") as behind,
    ):
        streamed = await behind.complete(stream=True)
        whole = await behind.complete()
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert whole.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 16
        await ends(behind)
        assert behind.router.metric("actual_cached_tokens_total") == 32
        assert behind.router.metric("picker_released_total", why="response") == 2
        assert behind.router.metric("ttft_seconds_count") == 1


@pytest.mark.parametrize("which", ["one", "unknown", "empty"])
async def test_a_subset_is_never_left(start_gateway: StartGateway, which: str) -> None:
    async with fake_workers(good, good) as workers:
        hint = {"one": [workers[1].url.removeprefix("http://")], "unknown": ["127.0.0.1:1"], "empty": ""}[which]
        async with start_gateway(workers, Modes(subset=hint)) as behind:
            answers = [await behind.complete() for _ in range(3)]
            expected = 200 if which == "one" else 503
            assert [answer.status_code for answer in answers] == [expected] * 3
            assert [len(worker.received) for worker in workers] == [0, 3 if which == "one" else 0]
            if expected == 503:
                assert answers[0].headers["retry-after"]
                assert answers[0].json()["error"]["type"] == "ServiceUnavailableError"


async def test_the_conformance_tests_choose_and_see_who_served(start_gateway: StartGateway) -> None:
    async with fake_workers(good, good) as workers, start_gateway(workers, picker_conformance=True) as behind:
        for worker in workers:
            named = worker.url.removeprefix("http://")
            answer = await behind.gateway.client.get("/v1/models/m", headers={"test-epp-endpoint-selection": named})
            assert answer.headers["x-conformance-test-served-endpoint"] == named


@pytest.mark.parametrize("modes", [pytest.param(DUPLEX, id="full duplex"), pytest.param(BUFFERED, id="buffered")])
async def test_keys_are_asked_for_and_no_worker_sees_one(
    start_gateway: StartGateway, tmp_path: Path, modes: Modes
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"key": "sk-0123456789abcdef", "tenant": "a", "requests_per_minute": 1}]}))
    async with fake_workers(good) as workers, start_gateway(workers, modes, api_keys_file=keys) as behind:
        client = behind.gateway.client
        refused = await behind.complete("x" * 100_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        client.headers["authorization"] = "Bearer sk-0123456789abcdef"
        assert (await behind.complete()).status_code == 200
        limited = await behind.complete()
        assert (limited.status_code, limited.headers["x-ratelimit-limit-requests"]) == (429, "1")
        assert [each.header("authorization") for each in workers[0].received] == [None]


@pytest.mark.parametrize("modes", [pytest.param(DUPLEX, id="full duplex"), pytest.param(BUFFERED, id="buffered")])
async def test_answers_are_whole_when_they_come_at_once(start_gateway: StartGateway, modes: Modes) -> None:
    """Of an answer that overtook the end of the picker's stream, the gateway would lose the body."""
    async with fake_workers(good, good) as workers, start_gateway(workers, modes) as behind:
        answers = await asyncio.gather(*(behind.complete(stream=True) for _ in range(100)))
        assert {answer.text[-14:] for answer in answers} == {"data: [DONE]\n\n"}
        await ends(behind)


@pytest.mark.parametrize("modes", [pytest.param(DUPLEX, id="full duplex"), pytest.param(BUFFERED, id="buffered")])
async def test_a_picker_that_stops_fails_no_request_in_progress(
    start_gateway: StartGateway, tmp_path: Path, modes: Modes
) -> None:
    """Over the Unix socket, as for an Envoy in the same pod."""
    release = asyncio.Event()
    async with (
        fake_workers(good_after(release)) as workers,
        start_gateway(workers, modes, picker_socket=tmp_path / "picker") as behind,
    ):
        asked = asyncio.create_task(behind.complete())
        await eventually(lambda: workers[0].received, "the request reaches the worker")
        stopping = asyncio.create_task(behind.picker.stop(30.0))
        release.set()
        assert (await asked).status_code == 200
        await stopping


async def test_a_request_that_may_not_wait_gets_a_429_that_says_why(start_gateway: StartGateway) -> None:
    """Of three long prompts one is computed, one waits, and there is no room for a third to wait."""
    long, release = "word " * 4000, asyncio.Event()
    async with (
        fake_workers(good_after(release)) as workers,
        start_gateway(workers, flow_control=True, flow_max_requests=1) as behind,
    ):
        asked = [asyncio.create_task(behind.complete(long)) for _ in range(3)]
        answer = await next(asyncio.as_completed(asked))
        assert (answer.status_code, answer.headers["x-llm-d-request-dropped-reason"]) == (429, "rejected-saturated")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        release.set()
        assert [each.status_code for each in await asyncio.gather(*asked)].count(200) == 2


async def test_a_gateway_without_a_ready_worker_gets_a_503(start_gateway: StartGateway) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    async with fake_workers() as workers, start_gateway(workers, hosts=[gone]) as behind:
        answer = await behind.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)
