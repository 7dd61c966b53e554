"""The work that one worker has, and how long a new request would take there: docs/routing.md, "Cost"."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvcache.feed import CacheGroup, Load, WorkerInfo
from kvcache.profiles import blocks_to_compute
from router.core.config import FleetConfig
from router.core.latency_correction import FleetCorrection, Span, WorkerCorrection
from router.core.latency_samples import Decoded, LatencySamples, Mark, Usage, full_sample
from router.core.ledger import ENDED, Entry, Ledger
from router.core.lengths import AnswerKind, AnswerLengths
from router.core.shape import Shape
from router.core.standing import Changes

STEP_TOKENS = 2048
"""Most prompt tokens that an engine computes in one step (vLLM's default below 70 GiB)."""
LATE = 2.0
"""A request is late when it takes this many times as long as expected."""
DECODE_TIME_WEIGHT = 0.05
"""Weight of one finished request in the mean of `DecodeTime`."""

LEFT = 0.75
"""Share of its length that an answer in progress has left, on average: a half if all answers are equally long, all of
it if their lengths are distributed exponentially."""
STALL_TOKENS = 24.0
"""A pause between tokens counts in full in an answer of so many tokens, half in one of twice as many: its share of the
time between two tokens (TPOT), which is a mean over the whole answer."""


class Expected(NamedTuple):
    """What is expected of one request on one worker. Seconds and blocks."""

    queue: float
    memory: float
    """The part of `queue` that waits for blocks to be released."""
    load: float
    """Loading blocks from slower tiers, after the loads that other requests wait for."""
    prefill: float
    unloaded: float
    """The prefill as the latency model predicts it, uncorrected and on an idle engine."""
    repeated: float
    """The part of `prefill` that computes what another worker has cached."""
    decode: float
    """From the first token to the end."""
    alone: float
    """The same if nothing else decoded there."""
    longest: float
    """From now to the end of the longest answer that the request allows; infinite if it sets no limit."""
    blocks: int
    """Blocks of the worker that the request takes in addition to those it reuses."""
    active: int
    """Blocks in use there once it runs."""
    context: int
    """Tokens whose keys and values each of its decode steps reads, on average."""
    slowdown: float
    """Seconds by which this request and those on the worker lengthen one another's decoding; pauses for its prefill as
    `STALL_TOKENS` weighs them."""
    kind: AnswerKind
    output: float
    """Tokens of its answer."""


class DecodeTime:
    """Mean over all workers of how long requests decode, which is how long they keep their blocks."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        """`seconds`: assumed until answers are observed."""
        self.seconds = seconds
        """Mean time from first token to release."""

    def observe(self, seconds: float) -> None:
        """A request was released `seconds` after its first token."""
        self.seconds += DECODE_TIME_WEIGHT * (seconds - self.seconds)


class Learnt:
    """What a fleet has learnt from the answers of all its workers."""

    def __init__(self, config: FleetConfig) -> None:
        self.correction = FleetCorrection()
        self.lengths = AnswerLengths(config.expected_output_tokens)
        self.decode_time = DecodeTime(config.expected_output_tokens * config.latency.decode)


def blocks_taken(shape: Shape, cached: int, loaded: int, size: int, groups: tuple[CacheGroup, ...]) -> int:
    """Blocks of `size` tokens that a request takes in addition to those it reuses, with `cached` of its tokens cached,
    the last `loaded` of which it loads: loaded blocks take room on the GPU, too."""
    if groups:
        return sum(_blocks_of(group, shape.prompt_tokens, cached, int(shape.output)) for group in groups)
    return -(-shape.prompt_tokens // size) - (cached - loaded) // size + int(shape.output) // size


def _blocks_of(group: CacheGroup, prompt_tokens: int, cached: int, output: int) -> int:
    """Blocks that a request takes of one group, in addition to those it reuses. Those that leave a sliding window are
    given back (vLLM's `SlidingWindowManager`), so they are no more than the window touches."""
    size = group.block_size
    blocks = -(-prompt_tokens // size) - cached // size + output // size
    if group.window:
        blocks = min(blocks, -(-(group.window - 1) // size) + 1)
    return blocks


class Work:
    """The ledger of this router's own requests, and what the worker's last report shows in addition to them.

    What a report shows beyond the ledger is foreign: requests of other routers. Requests of our own that were released
    while the report was on its way could look foreign, so it is compared with the most requests that were open since
    the last report.
    """

    def __init__(self, config: FleetConfig, learnt: Learnt, changes: Changes) -> None:
        self._config = config
        self._changes = changes
        self.row = -1
        """Where `router.core.table` has its standing."""
        self._decode_time = learnt.decode_time
        self._lengths = learnt.lengths
        self.correction = WorkerCorrection(learnt.correction, full_sample(config.latency))
        self.samples = LatencySamples(config.latency, self.correction)
        self.ledger = Ledger(config.latency.prefill(STEP_TOKENS // config.latency.block_size))
        self.block_size = config.block_size
        """Tokens of a block of the worker, in which its memory is counted; the router's until it says."""
        self.groups: tuple[CacheGroup, ...] = ()
        """Those of its cache, if it is not one of full attention."""
        self.load: Load | None = None
        """The last report; None: there is none, or it is too old."""
        self.capacity = 0
        """Usable blocks; 0: not known, and no request is expected to wait for blocks."""
        self._reported_at = 0.0
        self._peak = 0
        """Most requests that were open at one time since the last report."""
        self._foreign_requests = 0
        self._foreign_seconds = 0.0
        self._surplus_blocks = 0
        """Blocks in use beyond those of the ledger at the last report; negative when requests share blocks."""
        self._assigned = 0.0
        self._assigned_at = 0.0
        self._loads_end = 0.0
        """When the loads that this router's requests wait for are expected to have ended."""
        self._decoded = Decoded(0.0, 0.0)
        self._decoded_at = 0.0
        self.sent = 0
        """Requests sent to the worker since it joined."""
        self.prompt_tokens = 0
        """Tokens of their prompts, as far as their answers report cached tokens."""
        self.cached_tokens = 0
        """Those cached tokens."""

    # --- what is observed ----------------------------------------------------------------------------------

    def set_shape(self, info: WorkerInfo) -> None:
        """The worker says how its cache is divided."""
        shape = info.block_size or self._config.block_size, info.groups
        if shape != (self.block_size, self.groups):
            self.block_size, self.groups = shape
            self._changes.members += 1

    def report(self, load: Load, now: float) -> None:
        """The worker reports its load."""
        before = self.capacity, self._surplus_blocks, self.plain
        self._count_decoded(now)
        pending = self.ledger.remaining(now)
        self.load = load
        self.capacity = load.total_blocks
        self._reported_at = now
        self.samples.reported(load.prefilled, load.prefilled_tokens)
        self._foreign_requests = max(0, load.running + load.waiting - max(self._peak, self.ledger.in_flight))
        self._foreign_seconds = 0.0
        if self._foreign_requests or self.ledger.has_non_streaming:
            latency = self._config.latency
            blocks = load.prefill_tokens / latency.block_size
            seconds = latency.prefill_block * blocks + latency.prefill_base * load.waiting
            self._foreign_seconds = max(0.0, seconds * self.correction.prefill.factor(now) - pending)
        self._surplus_blocks = load.total_blocks - load.free_blocks - self.ledger.blocks
        self._peak = self.ledger.in_flight
        if before != (self.capacity, self._surplus_blocks, True) or not self.plain:
            self._changes.works.add(self)
        self._changes.on_room()

    def report_age(self, now: float) -> float | None:
        """Seconds since the last report; None: there is none, or it is too old."""
        return now - self._reported_at if self.load is not None else None

    def expire_report(self, now: float) -> None:
        """Forget a report that is older than `view_timeout`."""
        if self.load is not None and now - self._reported_at > self._config.view_timeout:
            self.forget_report()

    def forget_report(self) -> None:
        """The process that reported is gone or silent: only the ledger counts."""
        self._changes.works.add(self)
        self.load = None
        self.samples.reported(0, 0)
        self._foreign_requests = 0
        self._foreign_seconds = 0.0
        self._surplus_blocks = 0

    def open(self, expected: Expected, streaming: bool, now: float) -> Entry:
        """A request was dispatched to the worker."""
        self._changes.works.add(self)
        self.sent += 1
        self._count_decoded(now)
        self._assigned = self.assigned(now) + expected.prefill
        self._assigned_at = now
        self.samples.dispatched(expected.unloaded)
        if expected.load:
            self._loads_end = now + expected.queue + expected.load
        entry = self.ledger.open(
            expected.prefill,
            expected.blocks,
            streaming,
            now,
            now + LATE * expected.longest,
            expected.context,
            expected.load,
            expected.output,
        )
        self._peak = max(self._peak, self.ledger.in_flight)
        return entry

    def observe_decode_time(self, seconds: float) -> None:
        """A request that does not stream is estimated to have decoded for this long."""
        self._decode_time.observe(max(0.0, seconds))

    def observe_length(self, kind: AnswerKind, usage: Usage) -> None:
        """An answer to a request of this kind states its length, or not."""
        if usage.completion is not None:
            self._lengths.observe(kind, usage.completion)

    def mark(self, now: float) -> Mark:
        """The present state, from which the time of an answer will be measured."""
        ahead = self.ledger.remaining(now) / self.correction.prefill.factor(now)
        step = self._step(self._decoding()) if self.ledger.decoding else 0.0
        return self.samples.mark(now, ahead, step, self.decoded(now), alone=not self._foreign_requests)

    def decoded(self, now: float) -> Decoded:
        """All decoding on the worker up to now."""
        self._count_decoded(now)
        return self._decoded

    def first_token(self, entry: Entry, expected: Expected, now: float, *, certain: bool) -> None:
        """The prefill of a request is over. `certain`: it was known how much of its prompt the worker had cached."""
        self._changes.works.add(self)
        self._count_decoded(now)
        began = self.ledger.first_token(entry, now)
        self._changes.on_room()
        if began is None or not certain or self._foreign_requests:
            self.samples.discard_prefills()
            return
        self.ledger.remaining(now)
        work = Span(expected.unloaded, 0.0)
        step = self._step(self._decoding())
        if self.ledger.in_flight > 1 and expected.unloaded < step:
            work = Span(0.0, step)
        self.samples.prefill_ended(work, now - began, now, more=self.ledger.waiting)
        if self.samples.waiting:
            self._changes.sampling[self] = None

    def take_sample(self, now: float) -> bool:
        """Take the sample of the prefills that ended last if it is complete by now. Returns whether there still is one
        to be taken."""
        if self.samples.take_prefills(now):
            self._changes.works.add(self)
        return self.samples.waiting

    def observed(self) -> None:
        """An answer was compared with what was expected of it (`samples`)."""
        self._changes.works.add(self)

    def close(self, entry: Entry, first_token: float | None, now: float) -> None:
        """A request is over; `first_token` is when its first byte came, if any did. Idempotent."""
        self._changes.works.add(self)
        if first_token is not None and entry.state is not ENDED:
            self._decode_time.observe(now - first_token)
        self._count_decoded(now)
        self.ledger.close(entry, now)
        self._changes.on_room()

    # --- what is expected ---------------------------------------------------------------------------

    def leave(self) -> None:
        """The worker has left the fleet: what its last requests change matters to no decision."""
        self._changes = Changes()

    def in_flight(self) -> int:
        """Requests on the worker: those of this router and, as of the last report, of others."""
        return self.ledger.in_flight + self._foreign_requests

    def assigned(self, now: float) -> float:
        """Seconds of prefill that this router gave the worker, weighted by 2^(-age / half-life)."""
        if not self._assigned:
            return 0.0
        return self._assigned * math.exp2((self._assigned_at - now) / self._config.assigned_half_life)

    def assigned_log(self, half_life: float) -> float:
        """Logarithm of what was `assigned`, as if that had been at time 0."""
        return math.log2(self._assigned) + self._assigned_at / half_life if self._assigned else -math.inf

    def queue(self, now: float) -> float:
        """Seconds until the worker could start on a new request, not counting the wait for memory."""
        waiting = self.ahead(now)
        return waiting + 0.5 * self._step_in_progress(self.correction.decode.factor(now))

    def ahead(self, now: float) -> float:
        """Seconds of prefills that come first."""
        own = self.ledger.remaining(now)
        if self._foreign_seconds:
            own += max(0.0, self._foreign_seconds - (now - self._reported_at))
        return own + self.ledger.late(now)

    def _step_in_progress(self, decode_factor: float) -> float:
        """Seconds of a decode step as of the last `ahead`; 0: nothing decodes."""
        decoding = self._decoding()
        return self._step(decoding) * decode_factor if decoding else 0.0

    def expect(
        self, shape: Shape, matched: int, now: float, loaded: int = 0, load_seconds: float = 0.0, best: int = 0
    ) -> Expected:
        """What to expect of the request on this worker, with `matched` of its leading blocks cached, the last `loaded`
        of which it loads from slower tiers in `load_seconds`. `best`: what another worker has cached."""
        config, latency = self._config, self._config.latency
        prefill_factor, decode_factor = self.correction.prefill.factor(now), self.correction.decode.factor(now)
        waiting = self.ahead(now)
        shortest = self._step_in_progress(decode_factor)
        queue = waiting + 0.5 * shortest
        size, cached = self.block_size, matched * config.block_size
        unloaded = latency.prefill(blocks_to_compute(shape.prompt_tokens, cached, size, latency.block_size))
        prefill = unloaded * prefill_factor
        if prefill < shortest:  # a step that also decodes takes at least a decode step
            prefill = shortest
        repeated = 0.0
        if best > matched:
            rest = blocks_to_compute(shape.prompt_tokens, best * config.block_size, size, latency.block_size)
            repeated = prefill - max(latency.prefill(rest) * prefill_factor, shortest)
        output = shape.output
        context = shape.prompt_tokens + int(output) // 2
        alone = step = latency.decode_step(1, context) * decode_factor
        if shortest:
            step += shortest - latency.decode * decode_factor
        blocks = blocks_taken(shape, cached, loaded * config.block_size, size, self.groups)
        active = self.used_blocks() + blocks
        memory = self._memory_wait(active, blocks) * decode_factor if active > self.capacity > 0 else 0.0
        load = 0.0
        if loaded:
            load = max(self._loads_end - now - queue - memory, 0.0) + load_seconds
        longest = math.inf
        if shape.max_tokens is not None:
            longest = queue + memory + load + prefill + shape.max_tokens * step
        slowdown = 0.0
        if output and (others := self.in_flight()):
            # For as long as both decode, each step reads what either of them has and computes a token for each.
            theirs = latency.decode_sequence * others + latency.decode_token * self._context(self.ledger.reserved)
            mine = latency.decode_sequence + latency.decode_token * context
            own = self.ledger.in_flight
            left = LEFT * (self.ledger.output / own if own else self._lengths.mean)
            slowdown = min(output, left) * (theirs + mine * others) * decode_factor
            # None of them gets a token while a part of this prompt is computed that takes longer than a decode step.
            share = self.ledger.token_share + self._foreign_requests / max(self._lengths.mean, 1.0)
            slowdown += max(prefill - max(shortest, alone), 0.0) * STALL_TOKENS * share
        return Expected(
            queue + memory,
            memory,
            load,
            prefill,
            unloaded,
            repeated,
            output * step,
            output * alone,
            longest,
            blocks,
            active,
            context,
            slowdown,
            shape.kind,
            output,
        )

    def saved(self, prompt: int, cached: int, now: float) -> float:
        """Seconds by which the prefill of `prompt` tokens was shorter because `cached` of them were there, as the
        corrected latency model has it."""
        latency, size = self._config.latency, self.block_size
        whole = latency.prefill(blocks_to_compute(prompt, 0, size, latency.block_size))
        rest = latency.prefill(blocks_to_compute(prompt, cached, size, latency.block_size))
        return (whole - rest) * self.correction.prefill.factor(now)

    def standing(self, turn: int, now: float) -> tuple[float, ...]:
        """What `expect` computes with, apart from the request, the time and the fleet: the fields of a `Standing`.
        `turn`: that of the worker."""
        ledger, latency = self.ledger, self._config.latency
        own, foreign = ledger.in_flight, self._foreign_requests
        waiting = ledger.waiting_at(now)
        others = own + foreign
        left = theirs = step = 0.0
        if others:
            left = LEFT * (ledger.output / own) if own else math.nan
            theirs = latency.decode_sequence * others + latency.decode_token * self._context(ledger.reserved)
            if decoding := self._decoding():
                step = self._step(decoding)
        assigned = self.assigned_log(self._config.assigned_half_life)
        used, capacity = self.used_blocks(), self.capacity or math.inf
        prefill, prefill_mass = self.correction.prefill.own
        decode, decode_mass = self.correction.decode.own
        return (
            *waiting,
            ledger.late_from,
            self._foreign_seconds,
            self._reported_at,
            step,
            others,
            foreign,
            theirs,
            left,
            ledger.token_share,
            used,
            capacity,
            capacity - used,
            assigned,
            turn,
            prefill if prefill_mass >= 1.0 else math.nan,
            decode if decode_mass >= 1.0 else math.nan,
            prefill_mass,
            decode_mass,
        )

    @property
    def plain(self) -> bool:
        """Whether all requests on the worker are this router's, stream, and load no blocks."""
        return not (self._foreign_requests or self._foreign_seconds) and self.ledger.plain

    @property
    def room(self) -> float:
        """Blocks that are not in use; infinite if it is not known how many there are."""
        return self.capacity - self.used_blocks() if self.capacity else math.inf

    def used_blocks(self) -> int:
        """Blocks in use by the requests on the worker."""
        return max(0, self.ledger.blocks + self._surplus_blocks)

    def _decoding(self) -> int:
        """Requests that decode: own ones, and others' as of the last report."""
        return self._foreign_requests + self.ledger.decoding

    def _context(self, own: int) -> int:
        """Tokens of context of requests that decode: `own` of this router's, and those of other routers, which are
        taken to use what is in use besides the blocks of the ledger."""
        return own + max(self._surplus_blocks, 0) * self.block_size if self._foreign_requests else own

    def _step(self, decoding: int) -> float:
        """Seconds of a decode step of so many requests now, uncorrected."""
        return self._config.latency.decode_step(decoding, self._context(self.ledger.context))

    def _count_decoded(self, now: float) -> None:
        """Count the decoding since the last call. Called before anything changes that a step depends on."""
        elapsed = now - self._decoded_at
        if elapsed > 0.0:
            if decoding := self._decoding():
                seconds, steps = self._decoded
                self._decoded = Decoded(seconds + elapsed, steps + elapsed / self._step(decoding))
            self._decoded_at = now

    def _memory_wait(self, active: int, needed: int) -> float:
        """Seconds until enough blocks are released, where `active` in use with the `needed` ones are too many: requests
        give theirs back evenly over the mean decode time."""
        used = active - needed
        return self._decode_time.seconds * (active - self.capacity) / used if used else 0.0
