"""An agent and a router beside an engine, and what a request through them was predicted to find and found."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

from kvcache.ranks import RANK_HEADER, rank_url
from router.discovery.discovered import DiscoveredWorker
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.real_vllm.served import Served
from tests.real_vllm.wire import Wire
from tests.router.conftest import RunningRouter, StartRouter, until
from worker.agent.agent import Agent
from worker.agent.main import App
from worker.agent.prompts import Expected
from worker.agent.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """One answer: the cached tokens that the router predicted, and those that the engine reported (None: none were)."""

    status: int
    predicted: int
    cached: int | None
    text: str

    @property
    def verdict(self) -> str:
        if self.status != 200:
            return "refused"
        if self.cached is None:
            return "not reported"
        return "equal" if self.predicted == self.cached else "different"


@contextlib.asynccontextmanager
async def following(
    served: Served, wire: Wire | None = None, adapters_file: Path | None = None
) -> AsyncIterator[tuple[Agent, str]]:
    """An agent that follows the engine, through `wire` if there is one, and its URL. It keeps the adapters of the file
    loaded."""
    through = wire or served
    token, tokens = served.images or (None, 1)
    settings = Settings(
        engine_url=served.url,
        events_endpoint=through.events,
        replay_endpoint=through.replay,
        worker_id="vllm-0",
        poll_interval=0.05,
        adapters_file=adapters_file,
        image_token=token,
        image_tokens=tokens,
    )
    sock = listen("127.0.0.1", 0)
    agent = Agent(settings, lambda: Expected.of(served.tokenizer), sock.getsockname()[1])
    server = HttpServer(App(agent), sock, cancel_on_disconnect=True)
    await server.start()
    task = asyncio.create_task(agent.run())
    try:
        yield agent, f"http://127.0.0.1:{server.port}"
    finally:
        agent.stop_serving()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)
        agent.close()


class Bed:
    """Requests go through `router`, one at a time unless a test says otherwise, and to any rank unless one is
    `pinned`."""

    def __init__(self, served: Served, agent: Agent, router: RunningRouter) -> None:
        self.served = served
        self.agent = agent
        self.router = router
        self.pinned: int | None = None

    def held(self) -> Counter[bytes]:
        """The blocks of all ranks as the router sees them."""
        return sum(self._held_by_rank(), Counter[bytes]())

    def _held_by_rank(self) -> list[Counter[bytes]]:
        fleet = self.router.router.fleet
        return [Counter(fleet.held_blocks(url)) for url in self._urls]

    @property
    def _urls(self) -> list[str]:
        """The ranks as the router names them."""
        return [rank_url(self.served.url, rank) for rank in range(self.served.ranks)]

    async def settled(self) -> None:
        """Wait until the router knows all that the engine has done.

        The engine publishes a step when the step is over, and the answer that ended with it may have been read before.
        """
        async with asyncio.timeout(60):
            while not await self._is_settled():  # noqa: ASYNC110  # nothing to wait on: several processes have to agree
                await asyncio.sleep(0.001)

    async def _is_settled(self) -> bool:
        served, agent = self.served, self.agent
        if not served.idle() or agent.problem:
            return False
        published, seen = served.published(), self._seen()
        await asyncio.sleep(served.quiet)
        if published is not None and published != [rank.view.follower.next or 0 for rank in agent.ranks]:
            return False
        statuses = {one.url: one.matching and one.ready for one in self.router.router.fleet.workers(time.monotonic())}
        if not all(statuses.get(url) for url in self._urls):
            return False
        known = [Counter(key for key, _ in rank.view.follower.blocks.blocks()) for rank in agent.ranks]
        return self._held_by_rank() == known and seen == self._seen()

    def _seen(self) -> list[tuple[str, float | None]]:
        """How far the agent has followed each rank."""
        return [(rank.view.feed.position, rank.last_event_at) for rank in self.agent.ranks]

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.pinned is None else {RANK_HEADER: str(self.pinned)}

    async def ask(self, path: str, body: dict[str, Any]) -> Outcome:
        """Send one request when the router knows everything. A prediction holds for such a request."""
        await self.settled()
        return await self.ask_at_once(path, body)

    async def ask_at_once(self, path: str, body: dict[str, Any]) -> Outcome:
        """Send one request now."""
        before = self.router.metric("predicted_cached_tokens_total")
        answer = await self.router.client.post(path, json=body, headers=self.headers)
        predicted = int(self.router.metric("predicted_cached_tokens_total") - before)
        if answer.status_code != 200 or _fails(answer.content):
            return Outcome(max(answer.status_code, 400), predicted, None, answer.text)
        return Outcome(200, predicted, reported(answer.content), _text(answer))

    async def complete(self, prompt: Any, **fields: Any) -> Outcome:
        """One completion of one token."""
        body = {"model": self.served.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **fields}
        return await self.ask("/v1/completions", body)


@contextlib.asynccontextmanager
async def bed(
    served: Served, start_router: StartRouter, wire: Wire | None = None, adapters_file: Path | None = None
) -> AsyncIterator[Bed]:
    """A bed beside the engine, at rest."""
    # A stopped engine is part of some tests; its view is to be lost by what the agent says, not by time.
    settings = {"routing_strategy": "cache_aware", "view_timeout": 600.0}
    async with (
        following(served, wire, adapters_file) as (agent, feed),
        start_router(load=lambda name: served.tokenizer, **settings) as router,
    ):
        router.router.fleet_sync.apply({served.url: DiscoveredWorker(feed=feed)})
        await router.ready(served.ranks)
        await until(lambda: agent.problem == "")
        one = Bed(served, agent, router)
        await one.settled()
        yield one


def reported(content: bytes) -> int | None:
    """The cached tokens that an answer of any API states, streamed or not."""
    found = None
    for line in content.splitlines():
        data = line.removeprefix(b"data: ")
        if not data.startswith(b"{"):
            continue
        event = orjson.loads(data)
        for part in (event, event.get("response"), event.get("message")):
            cached = _cached((part or {}).get("usage")) if isinstance(part, dict) or part is None else None
            found = found if cached is None else cached
    return found


def _fails(content: bytes) -> bool:
    """Whether a stream, whose status was sent before, ends with an error."""
    events = (line.removeprefix(b"data: ") for line in content.splitlines() if line.startswith(b"data: {"))
    return any("error" in event or event.get("type") == "error" for event in map(orjson.loads, events))


def _cached(usage: Any) -> int | None:
    """Of the usage of a chat or completion, of a response, or of a message."""
    if not isinstance(usage, dict):
        return None
    for name in ("prompt_tokens_details", "input_tokens_details"):
        details = usage.get(name)
        if isinstance(details, dict) and details.get("cached_tokens") is not None:
            return int(details["cached_tokens"])
    return usage.get("cache_read_input_tokens")


def _text(answer: httpx.Response) -> str:
    """The text of a whole chat's answer; empty for the others."""
    if not answer.content.startswith(b"{"):
        return ""
    choices = answer.json().get("choices") or [{}]
    return ((choices[0].get("message") or {}).get("content")) or ""
