"""What one worker is busy with, and how long a request would wait there: docs/routing.md, "Cost"."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvcache.feed import Load
from kvcache.profiles import blocks_to_compute
from router.core.config import FleetConfig
from router.core.decision import RouteRequest
from router.core.latency_correction import FleetPace, Span, WorkerPace
from router.core.latency_samples import Cost, Lessons, Mark, full_sample
from router.core.ledger import Entry, Ledger

STEP_TOKENS = 2048
"""Prompt tokens that an engine computes in one step at most (vLLM's default below 70 GiB)."""
LATE = 2.0
"""A request is late when it takes this many times as long as expected."""
RESIDENCE_WEIGHT = 0.05
"""Share of one finished request in the mean time that requests spend decoding."""


class Shape(NamedTuple):
    """What the cost of a request depends on, besides the worker."""

    prompt_tokens: int
    prompt_blocks: int
    """A last partial one included."""
    reusable_blocks: int
    """Blocks a worker may reuse: never the one of the last token (vLLM rule 8)."""
    output_tokens: int | None


def shape_of(request: RouteRequest, block_size: int) -> Shape:
    """What the cost of this request depends on."""
    tokens, depth = request.prompt_tokens, request.keys.depth if request.keys is not None else 0
    if not request.prompted:
        return Shape(0, 0, 0, 0)
    if tokens is None:
        tokens = depth * block_size + 1
    return Shape(
        prompt_tokens=tokens,
        prompt_blocks=-(-tokens // block_size),
        reusable_blocks=min(depth, max(tokens - 1, 0) // block_size),
        output_tokens=request.output_tokens,
    )


class Expected(NamedTuple):
    """One worker's figures for one request. Seconds and blocks."""

    queue: float
    memory: float
    """The part of the queue that waits for blocks."""
    prefill: float
    unloaded: float
    """The prefill alone, as the latency model has it, uncorrected."""
    decode: float
    """From the first token to the end."""
    longest: float
    """From now to the end of the longest answer that was asked for; infinite if no length was."""
    blocks: int
    """Blocks that the request takes beyond those it shares."""


class Residence:
    """Means over all workers of how long blocks stay taken, and of how long answers are."""

    __slots__ = ("seconds", "tokens")

    def __init__(self, tokens: float, decode: float) -> None:
        """Assumed until observed: the length of an answer, and seconds of a decode step."""
        self.tokens = tokens
        """Of an answer."""
        self.seconds = tokens * decode
        """From first token to release."""

    def observe(self, seconds: float) -> None:
        self.seconds += RESIDENCE_WEIGHT * (seconds - self.seconds)

    def generated(self, tokens: int) -> None:
        self.tokens += RESIDENCE_WEIGHT * (tokens - self.tokens)


class Work:
    """The ledger of this router's own requests, and what the worker's last report holds beyond them.

    A report is compared with the ledger as it stood when the report came in. Own requests released while a report
    was under way could look foreign, so the report is held against the most that was open since the last one.
    """

    __slots__ = (
        "_assigned",
        "_assigned_at",
        "_config",
        "_foreign_requests",
        "_foreign_seconds",
        "_peak",
        "_reported_at",
        "_residence",
        "_surplus_blocks",
        "capacity",
        "ledger",
        "lessons",
        "load",
        "pace",
    )

    def __init__(self, config: FleetConfig, pace: FleetPace, residence: Residence) -> None:
        self._config = config
        self._residence = residence
        self.pace = WorkerPace(pace, full_sample(config.latency))
        self.lessons = Lessons(config.latency, config.block_size, self.pace)
        self.ledger = Ledger(config.latency.prefill(STEP_TOKENS // config.block_size))
        self.load: Load | None = None
        """As last reported."""
        self.capacity = 0
        """Usable blocks; 0: not known, and nothing waits for memory."""
        self._reported_at = 0.0
        self._peak = 0
        self._foreign_requests = 0
        self._foreign_seconds = 0.0
        self._surplus_blocks = 0
        """Blocks in use beyond those of the ledger at the last report; negative when requests share blocks."""
        self._assigned = 0.0
        self._assigned_at = 0.0

    # --- what comes in ----------------------------------------------------------------------------------

    def report(self, load: Load, now: float) -> None:
        """The worker's own word on its load."""
        pending = self.ledger.remaining(now)
        self.load = load
        self.capacity = load.total_blocks
        self._reported_at = now
        self.lessons.reported(load.prefilled, load.prefilled_tokens)
        self._foreign_requests = max(0, load.running + load.waiting - max(self._peak, self.ledger.in_flight))
        self._foreign_seconds = 0.0
        if self._foreign_requests or self.ledger.unseen:
            latency = self._config.latency
            blocks = load.prefill_tokens / self._config.block_size
            seconds = (latency.prefill_block * blocks + latency.prefill_base * load.waiting) * self.pace.prefill.factor(
                now
            )
            self._foreign_seconds = max(0.0, seconds - pending)
        self._surplus_blocks = load.total_blocks - load.free_blocks - self.ledger.blocks
        self._peak = self.ledger.in_flight

    def expire_report(self, now: float) -> None:
        """A report that is as old as a view may be at most says nothing any more."""
        if self.load is not None and now - self._reported_at > self._config.view_timeout:
            self.forget_report()

    def forget_report(self) -> None:
        """The process that reported is gone, or silent."""
        self.load = None
        self.lessons.reported(0, 0)
        self._foreign_requests = 0
        self._foreign_seconds = 0.0
        self._surplus_blocks = 0

    def open(self, expected: Expected, streaming: bool, now: float) -> Entry:
        """A request was dispatched to the worker."""
        self._assigned = self.assigned(now) + expected.prefill
        self._assigned_at = now
        self.lessons.given(expected.unloaded)
        entry = self.ledger.open(
            expected.prefill,
            expected.blocks,
            streaming,
            now,
            now + LATE * expected.longest,
        )
        self._peak = max(self._peak, self.ledger.in_flight)
        return entry

    def resided(self, seconds: float) -> None:
        """A request that does not stream is estimated to have held its blocks for so long after its prefill."""
        self._residence.observe(max(0.0, seconds))

    def generated(self, cost: Cost) -> None:
        """An answer states its length."""
        if cost.completion is not None:
            self._residence.generated(cost.completion)

    def mark(self, now: float) -> Mark:
        """A moment that answers are held against."""
        ahead = self.ledger.remaining(now) / self.pace.prefill.factor(now)
        return self.lessons.mark(now, ahead, alone=not self._foreign_requests, decoding=self.ledger.decoding)

    def first_token(self, entry: Entry, expected: Expected, now: float, *, certain: bool) -> None:
        """The prefill of a request is over. `certain`: what the worker had of its prompt was known."""
        began = self.ledger.first_token(entry, now)
        if began is None or not certain or self._foreign_requests:
            self.lessons.forget()
            return
        self.ledger.remaining(now)
        work = Span(expected.unloaded, 0.0)
        decode = self._config.latency.decode
        if self.ledger.in_flight > 1 and expected.unloaded < decode:
            work = Span(0.0, decode)
        self.lessons.prefilled(work, now - began, now, more=self.ledger.waiting)

    def close(self, entry: Entry, first_token: float | None, now: float) -> None:
        """A request is over; `first_token` is when its first byte came, if any did. Idempotent."""
        if entry.open and first_token is not None:
            self._residence.observe(now - first_token)
        self.ledger.close(entry, now)

    # --- what follows from it ---------------------------------------------------------------------------

    def in_flight(self) -> int:
        """Requests on the worker: this router's own and, as of the last report, others'."""
        return self.ledger.in_flight + self._foreign_requests

    def assigned(self, now: float) -> float:
        """Seconds of prefill that this router gave the worker, halved with every half-life of age."""
        if not self._assigned:
            return 0.0
        return self._assigned * math.exp2((self._assigned_at - now) / self._config.assigned_half_life)

    def queue(self, now: float) -> float:
        """Seconds until the worker could start on a newcomer, waiting for memory aside."""
        own = self.ledger.remaining(now)
        foreign = 0.0
        if self._foreign_seconds:
            foreign = max(0.0, self._foreign_seconds - (now - self._reported_at))
        step = 0.5 * self._config.latency.decode * self.pace.decode.factor(now) if self._decoding() else 0.0
        return own + foreign + step + self.ledger.late(now)

    def expect(self, shape: Shape, matched: int, now: float) -> Expected:
        """What the request would meet here, with `matched` of its leading blocks cached."""
        config, latency = self._config, self._config.latency
        self.lessons.settle(now)
        prefill_factor, decode_factor = self.pace.prefill.factor(now), self.pace.decode.factor(now)
        queue = self.queue(now)
        computed = blocks_to_compute(shape.prompt_tokens, matched * config.block_size, config.block_size)
        unloaded = latency.prefill(computed)
        prefill = unloaded * prefill_factor
        if self._decoding():  # a step that also decodes takes at least a decode step
            prefill = max(prefill, latency.decode * decode_factor)
        output = self._residence.tokens
        if shape.output_tokens is not None:
            output = min(output, shape.output_tokens)
        decode = output * latency.decode * decode_factor
        blocks = shape.prompt_blocks - matched + int(output) // config.block_size
        memory = self._memory_wait(blocks) * decode_factor if self.capacity else 0.0
        longest = math.inf
        if shape.output_tokens is not None:
            longest = queue + memory + prefill + shape.output_tokens * latency.decode * decode_factor
        return Expected(queue + memory, memory, prefill, unloaded, decode, longest, blocks)

    def _decoding(self) -> bool:
        return self._foreign_requests > 0 or self.ledger.decoding

    def _memory_wait(self, needed: int) -> float:
        """Seconds until enough blocks are released: requests give theirs back evenly over a mean residence."""
        used = max(0, self.ledger.blocks + self._surplus_blocks)
        short = used + needed - self.capacity
        if short <= 0 or not used:
            return 0.0
        return self._residence.seconds * short / used
