"""Decisions among many workers, which are computed for all of them at once: they equal those that look at one worker
after the other.

Two fleets get the same events, in which workers of different kinds join, fill, stall, are lost, restart and leave. One
computes with all candidates at once from one candidate on, the other never does. Every decision must be the same to the
last bit, under every strategy.

Not covered: what a decision is (`test_decisions`, `test_decode_cost`, `test_estimates`), and how long it takes
(`bench.micro.index`).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.feed import (
    FULL_ATTENTION,
    SLIDING_WINDOW,
    Batch,
    CacheGroup,
    Event,
    HeldElsewhere,
    Load,
    Removed,
    Snapshot,
    Stored,
    Tier,
    WorkerInfo,
)
from kvcache.keys import PrefixKeys, block_keys, pack_tokens
from kvcache.profiles import LatencyModel
from router.core.decision import Decision, NoWorkerReady, RouteRequest
from router.core.errors import FeedRejected
from router.core.fleet import Fleet
from router.core.latency_samples import Usage
from router.core.outliers import Outcome
from router.core.selection import SELECTIONS
from router.core.sessions import session_of
from router.core.strategies import STRATEGIES
from router.core.ticket import Ticket
from router.core.worker_state import Intake
from tests.router.core.support import BLOCK, config, url_of

LATENCY = LatencyModel(0.005, 0.0025, 0.0005, 0.015, 0.0002, 1e-6, block_size=BLOCK)
WORKERS = 9
FIGURES = ("worker_id", "url", "reason", "matched_blocks", "loaded_blocks", "predicted_ttft", "queue_seconds",
           "prefill_seconds", "best_blocks", "reported_blocks", "rank")  # fmt: skip
KINDS: tuple[dict[str, object], ...] = (
    {},
    {},
    {"block_size": 2 * BLOCK},
    {"tier_seconds": {Tier.CPU: 0.001}},
    {"groups": (CacheGroup(FULL_ATTENTION, BLOCK), CacheGroup(SLIDING_WINDOW, BLOCK, 3 * BLOCK))},
)


class Twins:
    """The two fleets, and a random life for both."""

    def __init__(self, seed: int, strategy: str, *, alike: bool = False, calm: bool = False) -> None:
        """`alike`: workers of one kind, and prompts that nearly all end where what they have in common ends. `calm`:
        nothing but requests that stream, of this router alone, and workers that have room for them."""
        self.random = Random(seed)
        self.alike = alike
        self.calm = calm
        chosen = config(latency=LATENCY, strategy=strategy, session_ttl=5.0, expected_output_tokens=20)
        self.fleets = (Fleet(chosen, many=1), Fleet(chosen, many=10**9))
        self.now = 100.0
        self.epochs = [0] * WORKERS
        self.seqs = [0] * WORKERS
        self.held: list[list[bytes]] = [[] for _ in range(WORKERS)]
        self.infos = [self.info(number) for number in range(WORKERS)]
        self.prompts = [[prompt * 1000 + at // 40 for at in range(400)] for prompt in range(3)]
        self.open: list[tuple[Ticket, Ticket, RouteRequest]] = []
        self.decisions = 0

    def info(self, number: int) -> WorkerInfo:
        fields = {"block_size": BLOCK} | ({} if self.alike else self.random.choice(KINDS))
        return WorkerInfo(
            f"w{number}", 0, "m", fingerprint="f" * 32, key_scheme="sha256-prefix-128", capacity=300, **fields
        )  # type: ignore[arg-type]

    def load(self) -> Load:
        random = self.random
        if self.calm:
            return Load(0, 0, 0, random.randrange(250, 300), 300, random.randrange(9), 1000)
        counts = (random.randrange(4), random.randrange(3)) if random.random() < 0.5 else (0, 0)
        return Load(*counts, random.randrange(500), random.randrange(20, 300), 300, random.randrange(9), 1000)

    def prompt(self) -> list[int]:
        if self.alike:
            return self.prompts[0] + [self.random.randrange(50) for _ in range(self.random.choice((1, 1, 1, 1, BLOCK)))]
        base = self.random.choice(self.prompts)
        return base[: self.random.randrange(1, 300)] + [
            self.random.randrange(50) for _ in range(self.random.randrange(9))
        ]

    def each(self, call: str, *arguments: object) -> None:
        """The same call on both fleets, which fails on both or on neither."""
        outcomes = []
        for fleet in self.fleets:
            try:
                outcomes.append(repr(getattr(fleet, call)(*arguments)))
            except FeedRejected as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]

    def join(self, number: int) -> None:
        self.epochs[number] += 1
        self.seqs[number] = 0
        info = replace(self.infos[number], epoch=self.epochs[number])
        self.infos[number] = info
        keys = block_keys(self.prompt(), info.block_size)
        self.held[number] = list(keys)
        elsewhere: tuple[HeldElsewhere, ...] = ()
        if info.tier_seconds:
            elsewhere = (HeldElsewhere(Tier.CPU, 0, tuple(block_keys(self.prompt(), info.block_size))),)
        if info.groups:
            elsewhere = (HeldElsewhere(Tier.GPU, 1, tuple(keys[-5:])),)
        self.each("add", url_of(number))
        blocks = tuple((key, None) for key in keys)
        self.each("apply_snapshot", url_of(number), Snapshot(info, 0, self.load(), blocks, elsewhere), self.now)

    def report(self, number: int) -> None:
        events: tuple[Event, ...] = ()
        info, held = self.infos[number], self.held[number]
        if held and self.random.random() < 0.3:
            events = (Removed((held.pop(),)),)
        elif self.random.random() < 0.3:
            keys = block_keys(self.prompt(), info.block_size)
            events = (Stored(None, tuple(keys)),) if keys else ()
            held += keys
        self.seqs[number] += bool(events)
        self.each(
            "apply_batch", url_of(number), Batch(self.epochs[number], self.seqs[number], events, self.load()), self.now
        )

    def ask(self) -> None:
        random, prompt = self.random, self.prompt()
        keys = PrefixKeys(pack_tokens(prompt), BLOCK)
        session = session_of("s", str(random.randrange(3)), None, hint=random.random() < 0.5)
        request = RouteRequest(
            keys if random.random() < 0.9 else None,
            len(prompt),
            self.calm or random.random() < 0.6,
            output_tokens=random.choice([None, 0, 5, 40]),
            session=session if not self.calm and random.random() < 0.5 else None,
        )
        exclude = [url_of(random.randrange(WORKERS))] if random.random() < 0.2 else []
        decisions: list[Decision] = []
        for fleet in self.fleets:
            try:
                decisions.append(fleet.choose(request, self.now, exclude))
            except NoWorkerReady:
                assert not decisions
        if not decisions:
            return
        at_once, one_by_one = decisions
        assert [getattr(at_once, name) for name in FIGURES] == [getattr(one_by_one, name) for name in FIGURES]
        self.decisions += 1
        if random.random() < 0.8:
            tickets = [
                fleet.dispatch(each, request, self.now) for fleet, each in zip(self.fleets, decisions, strict=True)
            ]
            self.open.append((tickets[0], tickets[1], request))

    def progress(self) -> None:
        if not self.open:
            return
        at = self.random.randrange(len(self.open))
        *tickets, request = self.open[at]
        over = self.random.random() < 0.5
        usage = Usage(request.prompt_tokens or 0, self.random.randrange(1, 60), None)
        for ticket in tickets:
            if not over:
                ticket.first_token(self.now)
                continue
            if usage.completion != 1:
                ticket.finished(self.now, usage)
            ticket.release(self.now, reused=usage.completion != 2)
        if over:
            del self.open[at]

    def step(self) -> None:
        random, number = self.random, self.random.randrange(WORKERS)
        self.now += random.choice([0.0, 0.001, 0.02, 0.3])
        what = random.random()
        if what < 0.40:
            self.ask()
        elif what < 0.65:
            self.progress()
        elif what < 0.85 and self.epochs[number]:
            self.report(number)
        elif what < 0.90:
            self.join(number)
        elif what < 0.92:
            self.now += random.choice([0.5, 3.0, 11.0, 70.0])
        elif what < 0.94:
            self.each("expire", self.now)
        elif what < 0.96 and self.epochs[number]:
            self.each("answered", url_of(number), random.choice(list(Outcome)), self.now)
        elif what < 0.98 and self.epochs[number]:
            self.each("turned_away", url_of(number), random.choice([None, 2.0]), self.now)
        elif what < 0.99 and self.epochs[number]:
            self.each("set_intake", url_of(number), random.choice([Intake.OPEN, Intake.OPEN, Intake.DRAINING]))
        elif self.epochs[number]:
            self.each("remove", url_of(number))
            self.each("add", url_of(number))


@settings(max_examples=2)
@given(st.integers(0, 2**32))
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_so_it_is_where_all_workers_hold_the_beginning_that_prompts_share(strategy: str, seed: int) -> None:
    twins = Twins(seed, strategy, alike=True)
    for number in range(WORKERS):
        twins.join(number)
    for _ in range(100):
        twins.now += 0.01
        twins.ask()
        twins.progress()
    assert twins.decisions > 20


@settings(max_examples=12)
@given(st.integers(0, 2**32), st.booleans())
def test_so_it_is_where_a_worker_without_requests_is_enough_to_decide(seed: int, alike: bool) -> None:
    twins = Twins(seed, "cache_aware", alike=alike, calm=True)
    for number in range(WORKERS):
        twins.join(number)
    for _ in range(150):
        twins.now += twins.random.choice([0.0, 0.001, 0.02, 0.3])
        twins.random.choice([twins.ask, twins.ask, twins.progress, twins.progress, twins.progress])()
        if twins.random.random() < 0.2:
            twins.report(twins.random.randrange(WORKERS))
    assert twins.decisions > 20


@settings(max_examples=4)
@given(st.integers(0, 2**32))
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_decision_for_all_workers_at_once_is_that_for_one_after_the_other(strategy: str, seed: int) -> None:
    twins = Twins(seed, strategy)
    for number in range(WORKERS):
        twins.join(number)
    for _ in range(250):
        twins.step()
    assert twins.decisions > 20


def test_every_strategy_computes_with_all_workers_at_once() -> None:
    assert set(SELECTIONS) == set(STRATEGIES.values())


def test_a_decision_among_many_has_the_figures_of_all_when_they_are_asked_for() -> None:
    twins = Twins(0, "cache_aware")
    for number in range(WORKERS):
        twins.join(number)
    fleet, _ = twins.fleets
    request = RouteRequest(PrefixKeys(pack_tokens(twins.prompts[0]), BLOCK), 400, True)
    brief, whole = fleet.choose(request, 100.0), fleet.choose(request, 100.0, explain=True)
    assert [each.url for each in brief.candidates] == [brief.url]
    assert [each.url for each in whole.candidates] == [url_of(number) for number in range(WORKERS)]
    assert brief.url == whole.url
    assert brief.candidates[0] in whole.candidates
