"""A picker with a fleet in virtual time, and requests that end in every way."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson
from prometheus_client import CollectorRegistry

from kvcache.feed import Batch, Load
from kvcache.tokens.tokenizer import Tokenizer
from router.core.decision import RecentDecisions
from router.core.fleet import Fleet
from router.core.unobserved import Ended, Unobserved
from router.metrics import Metrics
from router.picker.dispatched import Dispatched, Following
from router.picker.picker import Picker
from router.picker.protocol import BodyMode
from router.picker.stream import BodyBudget, Refusal, Stream, StreamState
from router.server.models import Models
from router.server.prompts import PromptReader
from tests.router.core.support import BLOCK, CAPACITY, config, info, snapshot
from tests.router.picker.messages import request_body, request_headers, response_body, response_headers

BOUND = 600.0


def url_of(number: int) -> str:
    return f"http://10.0.0.{number + 1}:8000"


def endpoint(number: int) -> str:
    return f"10.0.0.{number + 1}:8000"


@dataclass
class Bench:
    """A picker and the parts behind it, on a clock that a test moves."""

    tokenizer: Tokenizer
    workers: int = 3
    full: bool = False
    strategy: str = "cache_aware"
    fallbacks: int = 2
    now: float = 1000.0
    released: Counter[Ended] = field(default_factory=Counter)
    busy: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fleet = Fleet(config(strategy=self.strategy, fingerprint=self.tokenizer.fingerprint))
        for number in range(self.workers):
            self.fleet.add(url_of(number))
            who = info(f"w{number}", fingerprint=self.tokenizer.fingerprint)
            self.fleet.apply_snapshot(url_of(number), snapshot(who), self.now)
        self.unobserved = Unobserved(self.fleet.reported, BOUND)
        self.following = Following(
            self.fleet,
            self.unobserved,
            Metrics(CollectorRegistry()),
            self.clock,
            self.busy.append,
            lambda why: self.released.update([why]),
            full=self.full,
        )
        prompts = PromptReader(self.tokenizer, BLOCK, lambda: self.fleet.directory.catalogue)
        self.picker = Picker(
            self.following, prompts, Models(self.fleet.directory), RecentDecisions(), self.clock, self.fallbacks
        )
        self.budget = BodyBudget(10_000_000, 20_000_000)

    def clock(self) -> float:
        return self.now

    def report(self, number: int, requests: int) -> None:
        """The worker reports so many requests."""
        load = Load(running=requests, free_blocks=CAPACITY, total_blocks=CAPACITY)
        self.fleet.apply_batch(url_of(number), Batch(1, 0, (), load), self.now)

    def sweep(self) -> None:
        self.released.update(self.unobserved.sweep(self.now))

    def in_flight(self) -> list[int]:
        return [status.in_flight for status in self.fleet.workers(self.now)]

    async def ask(self, body: Any = None, **headers: Any) -> tuple[Stream, list[bytes]]:
        """A request, as far as its answer by the picker."""
        stream = Stream(self.budget, full=self.full)
        if not self.full:
            headers.setdefault("mode", BodyMode.BUFFERED)
        data = orjson.dumps(body if body is not None else {"prompt": "One two three", "max_tokens": 4})
        stream.receive(request_headers(**headers))
        try:
            self.picker.admit(stream.request)
            if stream.state is StreamState.COLLECTING:
                stream.receive(request_body(data))
            picked = self.picker.pick_at_once(stream.request, self.now)
            answer, dispatched = picked or await self.picker.pick_later(stream.request, self.now)
        except Refusal as refusal:
            return stream, stream.refused(refusal)
        return stream, stream.routed(answer, dispatched)


async def play(bench: Bench, requests: int, rng: random.Random) -> None:
    """So many requests, which end in every way that a gateway and an engine know; the engines report what they run."""
    running: list[list[float]] = [[] for _ in range(bench.workers)]
    """When each request on each worker ends."""
    for number in range(requests):
        bench.now += rng.random() * 0.02
        way = rng.choice(["cut early", "cut", "whole", "events", "error", "served elsewhere", "pieces", "end of input"])
        if way == "cut early":
            stream = Stream(bench.budget, full=bench.full)
            stream.receive(request_headers())
            stream.receive(request_body(b"{", end=False))
            stream.end()
            continue
        streaming = way in ("events", "pieces")
        stream, _ = await bench.ask({"prompt": f"Number {number % 50}", "max_tokens": 4, "stream": streaming})
        follower = stream.follower
        assert isinstance(follower, Dispatched)
        at = next(each for each in range(bench.workers) if url_of(each) == follower.decision.url)
        if way == "served elsewhere":
            at = (at + 1) % bench.workers
        if way not in ("error", "whole"):
            running[at].append(bench.now + rng.random())
        match way:
            case "whole" | "served elsewhere":
                stream.receive(response_headers(200, endpoint(at), end=bench.full, content_type="application/json"))
            case "error":
                stream.receive(response_headers(rng.choice([400, 404, 500, 503]), endpoint(at)))
            case "events" | "pieces":
                stream.receive(response_headers(200, endpoint(at), content_type="text/event-stream"))
                if way == "pieces" and bench.full:
                    stream.receive(response_body(b'data: {"choices":[{"text":"a"}]}\n\n', end=rng.random() < 0.5))
            case _:
                pass
        if stream.state is not StreamState.ENDED:
            stream.end()
        if number % 20 == 0:
            for each, ends in enumerate(running):
                ends[:] = [end for end in ends if end > bench.now]
                bench.report(each, len(ends))
            bench.fleet.expire(bench.now)
            bench.sweep()
            # What nobody follows is never more than what the engines run and what they could not have counted yet.
            counted = sum(map(len, running))
            assert len(bench.unobserved) <= counted + 400
            await asyncio.sleep(0)
