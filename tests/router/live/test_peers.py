"""What becomes of each router that is asked for its report, and which routers are asked.

Not covered: the sums that are shown (`test_report`, `test_endpoints`), and real EndpointSlices (tests/kube/e2e).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from router.live import peers
from router.live.document import RouterPhase
from router.live.history import Step
from router.live.kubernetes import ServiceRouters
from router.live.peers import MAX_ROUTERS, AddressesUnknown, Answers, PeerAddress, PeerReports, StaticRouters
from router.live.report import Counts, encode_report
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch
from runtime.kube.reflector import EventStream
from runtime.settings import SettingsError
from tests.processes import free_port
from tests.router.conftest import MovedClock
from tests.router.discovery.slices import endpoint, endpoint_slice
from tests.router.live.test_report import BOUNDS, report

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """A router whose every answer is this one. Yields its base URL."""
    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.01)  # type: ignore[arg-type]
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site.name
    finally:
        await runner.cleanup()


@asynccontextmanager
async def asking(*urls: str) -> AsyncIterator[PeerReports]:
    async with aiohttp.ClientSession() as session:
        yield PeerReports(StaticRouters(urls), session, instance="own", bounds=BOUNDS, clock=MovedClock())


def answering(body: bytes, status: int = 200) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status)

    return answer


async def test_a_report_names_the_url_at_which_it_was_got() -> None:
    async with server(answering(encode_report(report("x")))) as url, asking(url) as asked:
        (got,) = (await asked.answers()).reports
        assert [router.url for router in got.routers] == [url]


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits so long")


def with_number(text: str) -> bytes:
    """A report of which one number is written so."""
    return encode_report(report("x", uptime_seconds=12345.0)).replace(b"12345.0", text.encode())


OTHER_BUCKETS = encode_report(report("x", bounds=((1.0,), (1.0,))))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        pytest.param(silent, "it did not answer within 0.05 s", id="silent"),
        pytest.param(answering(b"", 404), "another version", id="older"),
        pytest.param(answering(b"", 500), "it answers 500", id="broken"),
        pytest.param(answering(b"", 307), "it answers 307", id="redirect"),
        pytest.param(answering(b"<html>"), "no report of a router: Invalid JSON", id="something else"),
        pytest.param(answering(OTHER_BUCKETS), "other buckets", id="other buckets"),
        pytest.param(answering(b" " * 4096), "takes more than 1024 bytes", id="too large"),
        pytest.param(answering(with_number("1e999")), "uptime_seconds: Input should be a finite number", id="infinite"),
        pytest.param(answering(with_number("NaN")), "uptime_seconds: Input should be a finite number", id="no number"),
        pytest.param(answering(with_number("1e308")), "uptime_seconds: Input should be less than", id="too much"),
        pytest.param(
            answering(encode_report(report("x", counts=Counts(requests=2**60)))),
            "counts.requests: Input should be less than",
            id="more than can be added up",
        ),
        pytest.param(
            answering(encode_report(report("x", counts=Counts(requests=-1)))), "counts.requests", id="negative count"
        ),
        pytest.param(
            answering(encode_report(report("x", steps=(Step(1, 0.0, 1, 0, 0, 0.0, (), (), 0, 0.0),)))),
            "steps.0.seconds: Input should be greater than 0",
            id="a step without length",
        ),
    ],
)
async def test_a_router_that_gives_no_report_is_named(
    answer: Answer, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "TIMEOUT", 0.05 if answer is silent else 5.0)
    monkeypatch.setattr(peers, "MAX_BYTES", 1024)
    good = encode_report(report("good"))
    async with server(answer) as url, server(answering(good)) as other, asking(url, other) as asked:
        got = await asked.answers()
        assert [each.instance for each in got.reports] == ["good"], "one does not keep the others from being shown"
        (lost,) = got.unreachable
        assert (lost.url, lost.state) == (url, RouterPhase.UNREACHABLE)
        assert why in str(lost.reason)


async def test_a_report_of_ones_own_is_not_counted_twice() -> None:
    async with server(answering(encode_report(report("own")))) as url, asking(url) as asked:
        assert await asked.answers() == Answers()


async def test_a_router_with_two_addresses_is_counted_once() -> None:
    answer = answering(encode_report(report("x")))
    async with server(answer) as one, server(answer) as two, asking(one, two) as asked:
        assert len((await asked.answers()).reports) == 1


async def test_of_the_history_only_new_steps_are_asked_for() -> None:
    asked_after = []
    steps = tuple(Step(number, 5.0, number, 0, 0, 0.0, (), (), 0, 0.0) for number in range(1, 5))
    instance, known = "x", 2

    async def answer(request: web.Request) -> web.StreamResponse:
        after = int(request.query["after"])
        asked_after.append(after)
        return web.Response(body=encode_report(report(instance, steps=steps[after:known])))

    async def shown(asked: PeerReports) -> list[int]:
        (got,) = (await asked.answers()).reports
        return [step.number for step in got.steps]

    async with server(answer) as url, asking(url) as asked:
        assert isinstance(asked.clock, MovedClock)
        assert await shown(asked) == [1, 2]
        known = 4
        assert await shown(asked) == [1, 2], "an answer is used again for a second"
        asked.clock.now += 1.0
        assert await shown(asked) == [1, 2, 3, 4]
        instance = "restarted"
        asked.clock.now += 1.0
        assert await shown(asked) == [], "the steps of another process are forgotten"
        asked.clock.now += 1.0
        assert await shown(asked) == [1, 2, 3, 4]
        assert asked_after == [0, 2, 4, 0]


async def test_only_so_many_routers_are_asked() -> None:
    refused = [f"http://127.0.0.1:{free_port()}"] * (MAX_ROUTERS + 3)
    async with asking(*refused) as asked:
        got = (await asked.answers()).unreachable
        assert len(got) == MAX_ROUTERS + 1
        assert (got[-1].name, got[-1].reason) == ("3 more routers", "no more than 64 are asked")


class Counted(StaticRouters):
    """Counts how often it is asked."""

    asked = 0

    async def addresses(self) -> Sequence[PeerAddress]:
        self.asked += 1
        return await super().addresses()


@pytest.mark.parametrize(
    ("answers", "reads"), [pytest.param(True, 3, id="all answer"), pytest.param(False, 11, id="one does not")]
)
async def test_the_list_of_routers_is_read_again_sooner_while_one_does_not_answer(answers: bool, reads: int) -> None:
    async with server(answering(encode_report(report("x")))) as url, asking() as asked:
        assert isinstance(asked.clock, MovedClock)
        asked.routers = counted = Counted([url if answers else f"http://127.0.0.1:{free_port()}"])
        for _ in range(21):
            await asked.answers()
            asked.clock.now += 1.01
        assert counted.asked == reads


class Slices:
    """An API server that answers every list in one way."""

    def __init__(self, answer: object) -> None:
        self._answer = answer
        self.open = True

    async def list(self) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        raise NotImplementedError

    async def close(self) -> None:
        self.open = False


PORTS = ({"name": "management", "port": 9000, "protocol": "TCP"},)


async def listed(answer: object) -> Sequence[PeerAddress]:
    slices = Slices(answer)

    async def find() -> Slices:
        return slices

    routers = ServiceRouters(find, "rag-router-0")
    try:
        return await routers.addresses()
    finally:
        await routers.close()
        assert not slices.open


async def test_the_routers_are_those_of_the_management_service() -> None:
    own = endpoint("10.0.0.1", "rag-router-0", ready=True)
    others = [
        endpoint("10.0.0.2", "rag-router-1", ready=True, serving=False, terminating=False),
        endpoint("10.0.0.3", "rag-router-2", ready=True, serving=True, terminating=True),
    ]
    assert await listed({"items": [endpoint_slice("m", own, *others, ports=PORTS)]}) == [
        PeerAddress("http://10.0.0.2:9000", "rag-router-1"),
        PeerAddress("http://10.0.0.3:9000", "rag-router-2", leaving=True),
    ]
    assert await listed({}) == []


async def test_a_list_that_cannot_be_read_is_a_problem_in_words() -> None:
    with pytest.raises(AddressesUnknown, match=r"cannot be read: .*forbidden"):
        await listed(KubeApiError.of(ApiFailureCause.FORBIDDEN, "forbidden"))

    async def no_cluster() -> Slices:
        raise SettingsError("there is no cluster")

    async with aiohttp.ClientSession() as session:
        asked = PeerReports(ServiceRouters(no_cluster, "x"), session, instance="own", bounds=BOUNDS, clock=MovedClock())
        (lost,) = (await asked.answers()).unreachable
        assert (lost.name, lost.state) == ("other routers", RouterPhase.UNREACHABLE)
        assert "there is no cluster" in str(lost.reason)


class Leaving(StaticRouters):
    """Routers that terminate."""

    async def addresses(self) -> Sequence[PeerAddress]:
        return [replace(address, leaving=True) for address in await super().addresses()]


async def test_a_router_that_leaves_may_be_silent() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with asking(url) as asked:
        asked.routers = Leaving([url])
        assert await asked.answers() == Answers()
