"""What the times of answers say about the speed of an engine: each is compared with the engine's work in that time.

An engine that serves several requests at once takes longer for each of them, and is no slower for it. So a time is
compared with all the work that this router knows to have been done in it, not with the work of one request alone.

All seconds of work here are those that the latency model predicts, uncorrected.
"""

from __future__ import annotations

from typing import NamedTuple

from kvcache.profiles import LatencyModel, blocks_to_compute
from router.core.latency_correction import Span, WorkerCorrection

FULL_BLOCKS = 32
"""A prefill of this many blocks is a full sample; a shorter one, in which constant overheads show, weighs less."""
FULL_STEPS = 32
"""This many decode steps are a full sample."""
GUESSED = 0.25
"""Weight of a sample whose prefill is guessed: neither the answer nor the worker's feed says what was cached."""
APART = 0.1
"""Prefills that end within this share of the time of one prefill ended with the same step."""


def full_sample(latency: LatencyModel) -> Span:
    """The work that makes a sample of full weight."""
    return Span(latency.prefill(FULL_BLOCKS), FULL_STEPS * latency.decode)


class Usage(NamedTuple):
    """What an answer states that it took, over all its choices. Tokens; None: not stated."""

    prompt: int
    completion: int | None = None
    cached: int | None = None


class Prefilled(NamedTuple):
    """What a worker says it has prefilled since its process started, for all routers."""

    requests: int
    seconds: float


class Decoded(NamedTuple):
    """Decoding on a worker so far: the time in which anything decoded, and the steps that the latency model fits into
    it, given how many sequences decoded at each moment and how long their contexts were."""

    seconds: float
    steps: float


class Mark(NamedTuple):
    """A moment on a worker: what it had been given to prefill by then, and what of it was still to be done."""

    at: float
    seconds: float
    """Of all prefills given to it."""
    prefills: int
    ahead: float
    """Seconds of prefill that was given to it and not answered."""
    alone: bool
    """No other router's requests are known to be there."""
    reported: Prefilled | None
    """By the worker, if it says."""
    step: float
    """Seconds of the decode step in progress; 0: nothing decodes."""
    decoded: Decoded
    """All decoding by then."""


class LatencySamples:
    """Takes the samples of one worker and hands them to its correction. O(1) an answer; a few numbers of state."""

    def __init__(self, latency: LatencyModel, correction: WorkerCorrection) -> None:
        self._latency = latency
        self._correction = correction
        self._seconds = 0.0
        self._count = 0
        self._ended = Span(0.0, 0.0)
        """Work of the prefills that ended with the last step, which may not be all that ended with it."""
        self._ended_seconds = 0.0
        """How long they took."""
        self._ended_at = 0.0
        self._stated = 0, 0
        self._reported: Prefilled | None = None
        """What the worker stated last: requests and tokens, and what follows."""

    def reported(self, count: int, tokens: int) -> None:
        """The worker's own count of its prefills so far, and of the tokens computed in them; zeros: it does not say."""
        if self._stated == (count, tokens):
            return
        self._stated = count, tokens
        latency = self._latency
        seconds = latency.prefill_base * count + latency.prefill_block * tokens / latency.block_size
        self._reported = Prefilled(count, seconds) if count else None

    def dispatched(self, seconds: float) -> None:
        """The worker got one more prompt, with so much to prefill."""
        self._seconds += seconds
        self._count += 1

    def mark(self, now: float, ahead: float, step: float, decoded: Decoded, *, alone: bool) -> Mark:
        """The state now. `ahead`: seconds of prefill that is not answered yet; `step`: of the decode step in progress,
        0 if nothing decodes."""
        return Mark(now, self._seconds, self._count, ahead, alone, self._reported, step, decoded)

    def marked_after_dispatch(self, before: Mark) -> Mark:
        """The same state, with the prefills that were given to the worker since then."""
        return Mark(
            before.at,
            self._seconds,
            self._count,
            before.ahead,
            before.alone,
            before.reported,
            before.step,
            before.decoded,
        )

    def discard_prefills(self) -> None:
        """Forget the prefills that ended last: what was observed of them cannot be relied on."""
        self._ended = Span(0.0, 0.0)
        self._ended_seconds = 0.0

    def prefill_ended(self, work: Span, seconds: float, now: float, *, more: bool) -> None:
        """A prefill ended `seconds` after it began. Prefills that share a step end together, so only the sum over all
        that end with one step is a sample. `more`: another prefill is in progress."""
        self.take_prefills(now)
        self._ended = Span(self._ended.prefill + work.prefill, self._ended.decode + work.decode)
        self._ended_seconds += seconds
        self._ended_at = now
        if not more:
            self._correction.observe(self._ended, self._ended_seconds, now)
            self.discard_prefills()

    @property
    def waiting(self) -> bool:
        """Whether the prefills that ended last are a full sample, which `take_prefills` will take."""
        return self._ended.prefill >= self._latency.prefill(FULL_BLOCKS)

    def take_prefills(self, now: float) -> bool:
        """Take a sample of the prefills that ended last, once it is clear that no more of them end with that step.
        Returns whether it was taken."""
        ended = self._ended
        if not self.waiting or now - self._ended_at <= APART * self._correction.seconds(ended):
            return False
        self._correction.observe(ended, self._ended_seconds, now)
        self.discard_prefills()
        return True

    def answer_ended(
        self,
        sent: Mark,
        usage: Usage,
        predicted: float,
        block_size: int,
        decoded: Decoded,
        now: float,
        *,
        certain: bool,
    ) -> None:
        """An answer that did not stream has arrived, to a request sent at `sent`. Its time shows only the sum of
        prefill and decoding. If it does not state how much of its prompt was cached, its prefill is taken to be
        `predicted`; `certain`: the prediction knew what was cached. `block_size`: tokens of a block of the worker."""
        if usage.completion is None:
            return
        own, trust = predicted, 1.0 if certain else GUESSED
        if usage.cached is not None:
            computed = blocks_to_compute(usage.prompt, usage.cached, block_size, self._latency.block_size)
            own, trust = self._latency.prefill(computed), 1.0
        self._observe(sent, sent.ahead + own, own, usage.completion - 1, decoded, now, trust)

    def stream_ended(self, first_token: Mark, usage: Usage, decoded: Decoded, now: float) -> None:
        """A stream is over whose first token came at `first_token`. `decoded`: all decoding on the worker by now."""
        if usage.completion is not None:
            self._observe(first_token, first_token.ahead, 0.0, usage.completion - 1, decoded, now, 1.0)

    def _observe(
        self, since: Mark, ahead: float, own: float, steps: int, decoded: Decoded, now: float, trust: float
    ) -> None:
        if steps < 0 or now <= since.at:
            return
        if since.alone:
            count, others = self._count - since.prefills, self._seconds - since.seconds
        elif since.reported is not None and self._reported is not None:
            # Other routers' requests are there too: only the worker knows what was prefilled meanwhile.
            count = self._reported.requests - since.reported.requests
            others = self._reported.seconds - since.reported.seconds
            if count < 0:
                return  # the worker's process has restarted in between
            if own:  # its own prefill is among them
                count, others = max(count - 1, 0), max(others - own, 0.0)
            ahead = own
        else:
            return
        if count > steps:  # no more prefills than steps can have delayed the decoding
            count, others = steps, others * steps / count
        fitted = decoded.steps - since.decoded.steps
        step = (decoded.seconds - since.decoded.seconds) / fitted if fitted > 0.0 else self._latency.decode
        decode = (steps - count) * step
        span = Span(ahead + others, decode + since.step / 2)
        mine = self._correction.seconds(Span(own, decode))
        total = self._correction.seconds(span)
        if total > 0.0:
            self._correction.observe(span, now - since.at, now, trust=trust * mine / total)
