"""The live endpoints of whole routers over HTTP: the document, its events, one of several routers, and the saved time.

Not covered: what the page does with them (tests/router/page), the timing of events (`test_broadcast`), how reports are
added up (`test_report`), and a restart of the process (`test_restart`).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from kvcache.feed import Stored
from kvcache.keys import block_keys
from kvcache.tokens.tokenizer import Tokenizer
from router.core.view import Trust
from router.core.worker_state import Intake, WorkerPhase
from router.live import endpoints, peers
from router.live.document import Live, RouterPhase, decode
from router.live.endpoints import VIEWERS
from router.live.updates import applied, decode_update
from router.server.management import RouterEvent
from runtime.sse import SseReader
from tests.processes import free_port
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.fakes import answering, fake_workers, good


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates come every 20 ms, and other routers are asked as often."""
    monkeypatch.setattr(endpoints, "INTERVAL", 0.02)
    monkeypatch.setattr(peers, "FRESH", 0.01)


class Page:
    """A page's copy of the document."""

    def __init__(self, answer: httpx.Response) -> None:
        self._pieces = answer.aiter_raw()
        self._reader = SseReader(1 << 24)
        self.document: Live | None = None
        self.events: list[str] = []

    async def until(self, condition: Callable[[Live], bool]) -> Live:
        """Follow the events until this is true of the document."""
        async with asyncio.timeout(20):
            while self.document is None or not condition(self.document):
                for event in self._reader.feed(await anext(self._pieces)):
                    self.events.append(event.name)
                    if event.name == "live":
                        self.document = decode(event.data)
                    elif self.document is not None:
                        self.document = applied(self.document, decode_update(event.data))
        return self.document


@asynccontextmanager
async def opened(client: httpx.AsyncClient) -> AsyncIterator[Page]:
    async with client.stream("GET", "/live/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        yield Page(answer)


async def live(running: RunningRouter, **query: object) -> Live:
    answer = await running.management.get("/live", params=query)  # type: ignore[arg-type]
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    return decode(answer.content)


async def test_the_document_shows_what_clients_and_workers_saw(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    prompt = list(range(320))
    keys = block_keys(prompt, 16)
    async with fake_workers(good, good, answering(400)) as workers:
        for number, worker in enumerate(workers):
            worker.blocks = [(key, keys[at - 1] if at else None) for at, key in enumerate(keys[: 4 * number])]
            worker.serve_feed(tokenizer.fingerprint, name=f"w{number}")
        async with start_router(workers) as router:
            await until(lambda: all(len(worker.feeds) == 1 for worker in workers))
            answers = [await router.complete(prompt) for _ in range(6)]
            await router.client.get("/v1/nothing")
            document = await live(router, peers=0)
        (own,) = document.routers
        assert (own.state, own.ready, own.strategy, own.url) == (RouterPhase.SERVING, True, "round_robin", "")
        by_url = {worker.url: worker for worker in document.workers}
        for number, worker in enumerate(workers):
            shown = by_url[worker.url]
            served = [answer for answer in answers if answer.headers["x-kvcluster-worker"] == f"w{number}"]
            assert (shown.worker_id, shown.state, shown.ready) == (f"w{number}", WorkerPhase.SERVING, True)
            assert (shown.trust, shown.problem) == (Trust.EXACT, None)
            assert (shown.blocks, shown.capacity, shown.cache_fill) == (4 * number, 1000, 4 * number / 1000)
            assert (shown.running, shown.waiting, shown.in_flight) == (0, 0, 0)
            assert shown.requests == len(worker.received)
            reported = [answer.json()["usage"] for answer in served if answer.status_code == 200]
            cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in reported)
            assert shown.hit_rate == (cached / sum(usage["prompt_tokens"] for usage in reported) if reported else None)
        totals = document.totals
        assert (totals.requests, totals.errors) == (7, 0)
        reported = [answer.json()["usage"] for answer in answers if answer.status_code == 200]
        assert totals.prompt_tokens == sum(usage["prompt_tokens"] for usage in reported)
        assert totals.cached_tokens == sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in reported)
        chosen = [decision.worker_id for decision in reversed(document.decisions)]
        assert chosen == [answer.headers["x-kvcluster-worker"] for answer in answers]
        assert len({decision.id for decision in document.decisions}) == 6
        assert {decision.reason for decision in document.decisions} == {"round_robin"}


async def test_a_step_of_the_history_holds_what_came_in_it(start_router: StartRouter) -> None:
    async with fake_workers(good, good) as workers, start_router(workers) as router:
        gatherer, now = router.router.live.gatherer, 1_790_000_000.0
        gatherer.wall = lambda: now
        await router.complete("before")
        await until(lambda: router.metric("requests_total") == 1)
        gatherer.take_reading()  # the clock was set back: the history begins here
        for _ in range(5):
            await router.stream("a prompt")
        await until(lambda: router.metric("requests_total") == 6)
        now += 5.02
        gatherer.take_reading()
        history = (await live(router)).history
        assert history.at == (1_790_000_005,)
        assert history.requests_per_second == (pytest.approx(5 / 5.02),)
        assert history.hit_rate == (0.16,)
        assert history.ttft_p50[0] is not None
        assert history.load_skew == (None,)


async def test_a_page_follows_what_happens(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with fake_workers(good, good) as workers:
        for number, worker in enumerate(workers):
            worker.serve_feed(tokenizer.fingerprint, name=f"w{number}")
        async with start_router(workers) as router, opened(router.management) as page:
            await page.until(lambda now: [worker.trust for worker in now.workers] == [Trust.EXACT] * 2)
            await workers[0].publish(Stored(None, tuple(block_keys(range(64), 16))))
            await page.until(lambda now: {worker.blocks for worker in now.workers} == {0, 4})
            for count in range(3):
                await router.complete(f"prompt {count}")
            document = await page.until(lambda now: len(now.decisions) == 3)
            assert [decision.id.rpartition(":")[2] for decision in document.decisions] == ["3", "2", "1"]
            router.router.fleet.set_intake(workers[1].url, Intake.DRAINING)
            document = await page.until(lambda now: any(not worker.ready for worker in now.workers))
            (leaving,) = [worker for worker in document.workers if not worker.ready]
            assert (leaving.url, leaving.state) == (workers[1].url, WorkerPhase.DRAINING)
            assert leaving.problem == "it is terminating: chosen only when there is no other"
            router.router.fleet.remove(workers[1].url)
            await page.until(lambda now: len(now.workers) == 1)
            router.router.management.advance(RouterEvent.SIGTERM)
            await page.until(lambda now: now.routers[0].state is RouterPhase.DRAINING)
            assert set(page.events[1:]) == {"update"}


async def test_a_page_too_many_is_told_so(start_router: StartRouter) -> None:
    async with start_router() as router:
        async with AsyncExitStack() as stack:
            streams = [router.management.stream("GET", "/live/events") for _ in range(VIEWERS + 2)]
            answers = await asyncio.gather(*map(stack.enter_async_context, streams))
            assert Counter(answer.status_code for answer in answers) == {200: VIEWERS, 503: 2}
            (message, _) = [json.loads(await each.aread())["error"]["message"] for each in answers if each.is_error]
            assert "32 pages are open" in message
            assert (await live(router)).workers == ()
        await until(lambda: router.router.live.viewers.open == 0)


async def test_a_viewer_that_left_is_forgotten(start_router: StartRouter) -> None:
    async with start_router() as router:
        async with opened(router.management) as page:
            await page.until(lambda now: True)
            assert router.router.live.broadcast.viewers == 1
        await until(lambda: router.router.live.broadcast.viewers == 0)


async def test_streams_end_when_the_router_closes(start_router: StartRouter) -> None:
    async with start_router() as router, router.management.stream("GET", "/live/events") as answer:
        router.router.live.broadcast.close()
        assert b"retry: 2000" in await answer.aread()


async def test_the_page_and_its_files_may_run_nothing_else(start_router: StartRouter) -> None:
    async with start_router() as router:
        page = await router.management.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        again = await router.management.get("/", headers={"if-none-match": f'"other", W/{page.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == page.headers["etag"]
        for name in ("nothing.js", "..%2Fendpoints.py", "inter.LICENSE"):
            assert (await router.management.get(f"/page/{name}")).status_code == 404


# --- several routers ---


def url_of(router: RunningRouter) -> str:
    return str(router.management.base_url).rstrip("/")


async def test_any_router_shows_all_of_them(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with fake_workers(good, good) as workers:
        for number, worker in enumerate(workers):
            worker.serve_feed(tokenizer.fingerprint, name=f"w{number}")
        async with (
            start_router(workers) as one,
            start_router(workers[:1]) as two,
            start_router(workers, peers=[url_of(one), url_of(two)]) as asked,
        ):
            sent = [one, one, one, two, asked, asked]
            for router in sent:
                await router.complete("a prompt")
            document = await live(asked)
            assert [router.url for router in document.routers] == ["", *sorted([url_of(one), url_of(two)])]
            assert document.totals.requests == len(sent)
            assert document.totals.cached_tokens == 16 * len(sent)
            assert {worker.url: worker.requests for worker in document.workers} == {
                worker.url: len(worker.received) for worker in workers
            }
            assert len({decision.id for decision in document.decisions}) == len(sent)
            alone = await live(asked, peers=0)
            assert (len(alone.routers), alone.totals.requests) == (1, 2)
            async with opened(asked.management) as page:
                await page.until(lambda now: now.totals.requests == len(sent))
                await two.complete("a prompt")
                await page.until(lambda now: now.totals.requests == len(sent) + 1)


async def test_a_router_that_does_not_answer_is_named(start_router: StartRouter) -> None:
    unused = f"http://127.0.0.1:{free_port()}"
    async with fake_workers(answering(404)) as (older,), start_router(peers=[unused, older.url]) as router:
        document = await live(router)
        silent = {each.url: each for each in document.routers[1:]}
        assert {each.state for each in silent.values()} == {RouterPhase.UNREACHABLE}
        assert silent[unused].reason == "it cannot be reached: Connection refused"
        assert silent[older.url].reason == "it has no live report: is it of another version?"


async def test_a_router_among_its_own_peers_counts_once(start_router: StartRouter) -> None:
    async with start_router() as router:
        router.router.live.peers.routers = peers.StaticRouters([url_of(router)])
        document = await live(router)
        assert [each.url for each in document.routers] == [""]


async def test_nobody_is_asked_while_nobody_looks(start_router: StartRouter) -> None:
    async with fake_workers(answering(404)) as (other,), start_router(peers=[other.url]) as router:
        await router.management.get("/live", params={"peers": 0})
        await router.management.get("/status")
        assert other.received == []
