"""Router, agent and a running vLLM together: the router predicts the cached tokens that the engine reports.

Not covered: predicted times (the CPU build has no profile), several engines, engines on a GPU.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from kvcache.tokens.tokenizer import Tokenizer
from router.discovery.discovered import DiscoveredWorker
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.real_vllm.agent_requests import AgentRequests
from tests.real_vllm.conftest import Engine
from tests.real_vllm.requests import Requests
from tests.router.conftest import RunningRouter, StartRouter, until
from worker.agent.agent import Agent
from worker.agent.main import App
from worker.agent.prompts import Expected
from worker.agent.settings import Settings

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(1800)]

pytest_plugins = ("tests.router.conftest",)


@pytest.fixture
async def agent(engine: Engine, tokenizer: Tokenizer) -> AsyncIterator[tuple[Agent, str]]:
    settings = Settings(
        engine_url=engine.url,
        events_endpoint=engine.events,
        replay_endpoint=engine.replay,
        worker_id="vllm-0",
        tokenizer=engine.tokenizer,
        poll_interval=0.2,
    )
    sock = listen("127.0.0.1", 0)
    one = Agent(settings, lambda: Expected.of(tokenizer), sock.getsockname()[1])
    server = HttpServer(App(one), sock, cancel_on_disconnect=True)
    await server.start()
    task = asyncio.create_task(one.run())
    yield one, f"http://127.0.0.1:{server.port}"
    one.stop_serving()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.stop(0)
    one.close()


async def up_to_date(router: RunningRouter, agent: Agent, url: str) -> None:
    """The router holds what the agent has seen, and the engine has published nothing for a moment: it publishes a step
    when the step is over, and the answer that ended with it may have been read before."""
    async with asyncio.timeout(30):
        while True:
            seen = (agent.last_event_at, agent.view.feed.position)
            await asyncio.sleep(0.1)
            (status,) = (one for one in router.router.fleet.workers(time.monotonic()) if one.url == url)
            held = Counter(router.router.fleet.held_blocks(url))
            known = Counter(key for key, _ in agent.view.follower.blocks.blocks())
            if status.matching and held == known and seen == (agent.last_event_at, agent.view.feed.position):
                return


def reported(content: bytes) -> int | None:
    """The cached tokens that an answer states, streamed or not, of any API."""
    found = None
    for line in content.splitlines():
        data = line.removeprefix(b"data: ")
        if not data.startswith(b"{"):
            continue
        fields = orjson.loads(data)
        usage = fields.get("usage") or (fields.get("response") or {}).get("usage") or {}
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        found = details.get("cached_tokens", usage.get("cache_read_input_tokens", found))
    return found


def plain(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """A request whose prompt begins with one of a few long texts."""
    shared = [" ".join(str(random.Random(text).random()) for _ in range(12 + text)) for text in range(6)]
    own = f" {rng.randrange(4)} and {rng.randrange(3)}"
    fields: dict[str, Any] = {"model": model, "max_tokens": rng.randint(1, 20), "temperature": 0}
    if rng.random() < 0.3:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.2:
        fields["cache_salt"] = rng.choice(["a", "b"])
    if rng.random() < 0.5:
        return "/v1/completions", fields | {"prompt": rng.choice(shared) + own}
    return "/v1/chat/completions", fields | {"messages": [{"role": "user", "content": rng.choice(shared) + own}]}


class Mixed:
    """Random requests of every shape, some of them again, some asked for several answers or with several prompts."""

    def __init__(self, seed: int, model: str) -> None:
        self._rng = random.Random(seed)
        self._made = Requests(seed, model, templates=False)
        self._before: list[tuple[str, dict[str, Any]]] = []

    def next(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        if self._before and rng.random() < 0.55:
            path, body = rng.choice(self._before[-12:])
            body = dict(body)
        elif rng.random() < 0.7:
            path, body = "/v1/chat/completions", self._made.chat()
        else:
            path, body = "/v1/completions", self._made.completion()
        self._before.append((path, dict(body)))
        body["max_tokens"] = rng.randint(1, 24)
        if rng.random() < 0.25:
            body["n"], body["temperature"] = rng.randint(2, 3), 1
        if rng.random() < 0.3:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        elif rng.random() < 0.1:
            body["prompt_logprobs"] = 0
        return path, body


class Agents:
    """Random requests of the Messages and Responses APIs, some of them again, some that go on where others ended."""

    def __init__(self, seed: int, model: str) -> None:
        self._rng = random.Random(seed)
        self._made = AgentRequests(seed, model)
        self._before: list[tuple[str, dict[str, Any]]] = []

    def next(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        if self._before and rng.random() < 0.6:
            path, body = rng.choice(self._before[-12:])
            body = dict(body)
            name = "messages" if path == "/v1/messages" else "input"
            if isinstance(body[name], list) and rng.random() < 0.5:
                body[name] = [*body[name], {"role": "user", "content": f"and {rng.randrange(3)}?"}]
        elif rng.random() < 0.5:
            path, body = "/v1/messages", self._made.messages()
        else:
            path, body = "/v1/responses", self._made.responses()
        self._before.append((path, dict(body)))
        if rng.random() < 0.3:
            body["stream"] = True
        if rng.random() < 0.15:
            body["cache_salt"] = rng.choice(["a", "b"])
        return path, body


@pytest.mark.parametrize("mix", ["plain", "mixed", "agents"])
async def test_predicted_is_reported(
    engine: Engine,
    tokenizer: Tokenizer,
    start_router: StartRouter,
    agent: tuple[Agent, str],
    seed: int,
    number: int,
    mix: str,
) -> None:
    following, feed = agent
    rng, mixed = random.Random(seed), (Agents if mix == "agents" else Mixed)(seed, engine.model)
    counts, wrong = Counter[str](), []
    async with start_router(routing_strategy="cache_aware", view_timeout=600) as router:
        router.router.fleet_sync.apply({engine.url: DiscoveredWorker(feed=feed)})
        await router.ready(1)
        await until(lambda: following.problem == "")
        for _ in range(number):
            path, body = plain(rng, engine.model) if mix == "plain" else mixed.next()
            await up_to_date(router, following, engine.url)
            before = router.metric("predicted_cached_tokens_total")
            answer = await router.client.post(path, json=body)
            predicted = router.metric("predicted_cached_tokens_total") - before
            cached = reported(answer.content) if answer.status_code == 200 else None
            outcome = (
                "refused" if answer.status_code != 200
                else "not reported" if cached is None
                else "equal" if predicted == cached
                else "different"
            )  # fmt: skip
            counts[outcome] += 1
            counts["cached tokens"] += cached or 0
            if outcome == "different":
                wrong.append((predicted, cached, path, body))
    print(f"\npredicted = reported, {mix}, seed {seed}: {dict(counts)}")  # noqa: T201
    assert not wrong, wrong[:3]
    assert counts["cached tokens"] > 0
