"""Engines of another shape than the router's: predicted cached tokens are those that the engine reports.

A fleet and emulated engines run in virtual time, one request after the other, under eviction pressure.

Not covered: how the emulated engine itself compares with vLLM (tests/worker/engine, docs/vllm.md), requests at the
same time (tests/bench/test_simulate.py), and the wire between router and worker (test_feed.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given, settings

from kvcache.feed import Batch, Snapshot, WorkerInfo
from kvcache.keys import KEY_SCHEME, PrefixKeys, pack_tokens
from kvcache.profiles import LatencyModel, blocks_to_compute
from router.core.decision import RouteRequest
from router.core.fleet import Fleet, FleetConfig
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest

BLOCK = 4
"""Tokens of a block of the router."""
LATENCY = LatencyModel(prefill_base=0.005, prefill_block=0.0025, prefill_cached=0.0005, decode=0.015, block_size=BLOCK)
TOKENS = 400
"""What the cache of each engine holds."""


class Sevens:
    """Every generated token is a 7."""

    def token(self, index: int) -> int:
        return 7


class Cluster:
    """A router and its engines. Each request is over, and the router knows it, before the next comes."""

    def __init__(self, *engines: EngineConfig) -> None:
        self.now = 0.0
        self.fleet = Fleet(FleetConfig(block_size=BLOCK, fingerprint="-", latency=LATENCY))
        self.engines = {f"http://w{number}": Engine(config, LATENCY) for number, config in enumerate(engines)}
        self.seq = dict.fromkeys(self.engines, 0)
        self.requests = 0
        for url, engine in self.engines.items():
            config = engine.config
            info = WorkerInfo(url, 1, "m", config.block_size, "-", KEY_SCHEME, config.blocks, groups=config.groups)
            self.fleet.add(url)
            self.fleet.apply_snapshot(url, Snapshot(info, 0, engine.load(), ()), 0.0)

    def send(self, tokens: Sequence[int], output: int) -> tuple[int, int]:
        """Cached tokens of one request: as predicted, and as the engine reports them. The predicted prefill time is
        compared with the engine's, too."""
        request = RouteRequest(PrefixKeys(pack_tokens(tokens), BLOCK), len(tokens), True, output_tokens=output)
        decision = self.fleet.choose(request, self.now)
        engine = self.engines[decision.url]
        self.requests += 1
        cached = 0
        with self.fleet.dispatching(decision, request, lambda: self.now) as ticket:
            engine.submit(EngineRequest(str(self.requests), tokens, output, Sevens()), self.now)
            begun, self.now = self.now, self.now
            while (due := engine.next_event()) is not None:
                self.now = due
                for token in engine.advance(due):
                    if token.index == 0:
                        ticket.first_token(due)
                        cached = token.cached_tokens
                        blocks = blocks_to_compute(len(tokens), cached, engine.config.block_size, BLOCK)
                        assert abs(due - begun - LATENCY.prefill(blocks)) < 1e-9
                        if decision.reported_blocks * BLOCK == cached:
                            assert abs(decision.prefill_seconds - LATENCY.prefill(blocks)) < 1e-9
            ticket.served = True
        engine.take_finished()
        for url, engine in self.engines.items():
            events = tuple(feed_events(engine.take_events()))
            self.seq[url] += bool(events)
            self.fleet.apply_batch(url, Batch(1, self.seq[url], events, engine.load()), self.now)
        self.now += 2.0  # beyond the time for which blocks are assumed
        return decision.reported_blocks * BLOCK, cached


PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 30)),
    min_size=1,
    max_size=60,
)
"""The prefixes (of which there are three to choose from at each step), the length of the rest, and of the answer."""


def prompt(path: Sequence[int], rest: int, number: int) -> list[int]:
    """Each step of the path adds 16 tokens; the rest are 7s, which may go on with the answer of another request, or
    tokens that no other request has."""
    shared = [100 * depth + step for depth, step in enumerate(path) for _ in range(16)]
    return shared + [7 if number % 2 else 10_000 + number] * rest


@given(PROMPTS, st.lists(st.sampled_from([1, 2, 3, 8]), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_block_sizes_that_are_multiples_of_the_router_s(
    prompts: list[tuple[list[int], int, int]], multiples: list[int]
) -> None:
    cluster = Cluster(
        *(
            EngineConfig(TOKENS // (BLOCK * k), 512, 8, TOKENS // (BLOCK * k) * BLOCK * k, block_size=BLOCK * k)
            for k in multiples
        )
    )
    for number, (path, rest, output) in enumerate(prompts):
        predicted, reported = cluster.send(prompt(path, rest, number), output)
        assert predicted == reported


@given(PROMPTS, st.integers(2, 40), st.integers(1, 3), st.sampled_from([1, 2]), st.sampled_from([16, 64, 512]))
@settings(max_examples=25, deadline=None)
def test_sliding_windows(
    prompts: list[tuple[list[int], int, int]], window: int, groups: int, multiple: int, budget: int
) -> None:
    """The groups share a cache in which few windows outlast the next requests."""
    size = BLOCK * multiple
    hybrid = EngineConfig(
        TOKENS // size * 2, budget, 8, TOKENS // 2, block_size=size, sliding_window=window, sliding_groups=groups
    )
    cluster = Cluster(hybrid, EngineConfig(TOKENS // BLOCK, 512, 8, TOKENS // BLOCK * BLOCK, block_size=BLOCK))
    for number, (path, rest, output) in enumerate(prompts):
        predicted, reported = cluster.send(prompt(path, rest, number), output)
        assert predicted == reported
