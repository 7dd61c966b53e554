"""What a router predicts of a cache is what the engine then finds: engine, events, feed and fleet in one process.

Random requests with salts, adapters and images, on caches that are too small for them: plain ones, with a CPU tier,
with sliding windows, of several block sizes. The feed is the emulated engine's own, or an agent's by way of vLLM's
format.

Not covered: requests while others run, whose blocks are assumed (tests/router/core/test_staleness.py), lost batches
(tests/worker/agent/test_follower.py), and how text becomes tokens (tests/real_vllm).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.feed import Batch, Event, Load, Snapshot, Tier, WorkerInfo
from kvcache.keys import KEY_SCHEME, CacheScope, Image, PrefixKeys, pack_tokens
from kvcache.profiles import LatencyModel
from router.core.decision import RouteRequest
from router.core.fleet import Fleet, FleetConfig
from worker.agent.core.events import decode
from worker.agent.core.groups import EngineBlocks
from worker.emulator.adapters import Adapter
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import feed_events
from worker.emulator.engine.request import EngineRequest
from worker.emulator.kv_events.encoding import CacheGroup, VllmEvents
from worker.kv_events import WireFormat

URL = "http://worker:8000"
BLOCK = 16
IMAGE = 5
"""Tokens that stand for an image."""
LATENCY = LatencyModel(1e-3, 1e-3, 5e-4, 2e-3)
SCOPES = [CacheScope(), CacheScope("salt"), CacheScope(adapter="sql"), CacheScope("salt", "sql")]
ADAPTERS = {"sql": Adapter(1, "sql", "acme/sql", "m")}

pytestmark = pytest.mark.simulation


class Tokens:
    def token(self, index: int) -> int:
        return index % 3


class Chain:
    """One worker whose events reach a fleet at once. `agent`: by way of vLLM's format."""

    def __init__(self, config: EngineConfig, agent: bool) -> None:
        self.engine = Engine(config, LATENCY)
        specs = [CacheGroup("sliding_window", config.sliding_window)] * config.sliding_groups
        self._wire = VllmEvents(WireFormat.MAP, ADAPTERS, [CacheGroup(), *specs])
        self._blocks = EngineBlocks(config.block_size) if agent else None
        self.fleet = Fleet(FleetConfig(BLOCK, "-", LATENCY))
        self.now = 0.0
        self._seq = 0
        self._names = 0
        self._info = WorkerInfo(
            "w",
            1,
            "m",
            config.block_size,
            "-",
            KEY_SCHEME,
            config.blocks,
            groups=config.groups,
            tier_seconds={Tier.CPU: 1e-4} if config.cpu_blocks else {},
        )
        self.fleet.add(URL)
        self.snapshot()

    def snapshot(self) -> None:
        """The fleet takes the whole state of the feed."""
        source = self._blocks or self.engine
        blocks, elsewhere = tuple(source.blocks()), tuple(source.elsewhere())
        self.fleet.apply_snapshot(URL, Snapshot(self._info, self._seq, Load(), blocks, elsewhere), self.now)

    def publish(self) -> None:
        """What the engine has changed becomes one batch."""
        changes = self.engine.take_events()
        events: Sequence[Event] = feed_events(changes)
        if self._blocks is not None:
            events = self._blocks.apply(decode(self._wire.payload(changes, 0.0, 0)))
        self._seq += bool(events)
        self.fleet.apply_batch(URL, Batch(1, self._seq, tuple(events), Load()), self.now)

    def cached(self, prompt: list[int], scope: CacheScope, images: Sequence[Image]) -> tuple[int, int]:
        """Tokens that the fleet predicts and those that the engine then finds."""
        request = RouteRequest(PrefixKeys(pack_tokens(prompt), BLOCK, scope, images), len(prompt), streaming=True)
        decision = self.fleet.choose(request, self.now)
        ticket = self.fleet.dispatch(decision, request, self.now)
        self._names += 1
        self.engine.submit(
            EngineRequest(str(self._names), prompt, 9, Tokens(), scope, images=images, image_tokens=IMAGE), self.now
        )
        while (due := self.engine.next_event()) is not None:
            self.now = max(self.now, due)
            self.engine.advance(due)
            self.publish()
        ticket.first_token(self.now)
        ticket.release(self.now)
        self.now += 2.0  # what was assumed is over
        self.publish()
        (finished,) = self.engine.take_finished()
        return decision.matched_blocks * BLOCK, finished.cached_tokens


def prompt(rng: random.Random, size: int, longest: int) -> tuple[list[int], CacheScope, list[Image]]:
    """A prompt of a small tree of prefixes, often a whole number of blocks long."""
    tokens: list[int] = []
    images: list[Image] = []
    scope = rng.choice(SCOPES)
    while len(tokens) < longest and rng.random() < 0.9:
        if rng.random() < 0.15:
            images.append((len(tokens), rng.choice("ab")))
            tokens += [9] * IMAGE
        else:
            tokens += [rng.randrange(2)] * rng.choice([size, 2 * size, size - IMAGE, 7])
    tokens = tokens[:longest] or [1]
    return tokens, scope, [image for image in images if image[0] + IMAGE <= len(tokens)]


@pytest.mark.parametrize("agent", [pytest.param(False, id="its own feed"), pytest.param(True, id="an agent's feed")])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, id="plain"),
        pytest.param({"cpu_blocks": 1}, id="CPU"),
        pytest.param({"sliding_groups": 2}, id="windows"),
    ],
)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([16, 32, 64]),
    blocks=st.integers(24, 40),
    lower=st.integers(3, 60),
    window=st.integers(2, 130),
)
def test_predicted_is_actual(
    kind: dict[str, int], agent: bool, seed: int, size: int, blocks: int, lower: int, window: int
) -> None:
    rng = random.Random(seed)
    config = EngineConfig(
        blocks,
        64,
        2,
        size * 6,
        block_size=size,
        cpu_blocks=lower * kind.get("cpu_blocks", 0),
        cpu_block_seconds=1e-4,
        sliding_window=window if kind.get("sliding_groups") else 0,
        sliding_groups=kind.get("sliding_groups", 0),
    )
    chain = Chain(config, agent)
    for _ in range(40):
        if rng.random() < 0.02:
            chain.engine.reset_prefix_cache()
            chain.publish()
        if rng.random() < 0.2:
            chain.snapshot()
        predicted, actual = chain.cached(*prompt(rng, size, config.max_model_len - 2))
        assert predicted == actual
