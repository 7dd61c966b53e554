"""What the times of answers teach about an engine: each is held against what the engine had to do in that time.

An engine that serves several requests at once is slower for each of them, and no slower an engine. So a time is
compared with all the work that this router knows to have been done in it, not with the one request's own.
"""

from __future__ import annotations

from typing import NamedTuple

from kvcache.profiles import LatencyModel, blocks_to_compute
from router.core.latency_correction import Span, WorkerPace

FULL_BLOCKS = 32
"""A prefill of this many blocks is a full sample; a shorter one, where constant overheads show, weighs less."""
GUESSED = 0.25
"""Weight of a sample whose prefill is guessed: neither its answer nor the worker's feed says what was cached."""
APART = 0.1
"""Prefills that end within this share of the time that one takes ended with the same step."""
FULL_STEPS = 32
"""So are this many decode steps."""


def full_sample(latency: LatencyModel) -> Span:
    """What it takes for a sample to count in full."""
    return Span(latency.prefill(FULL_BLOCKS), FULL_STEPS * latency.decode)


class Cost(NamedTuple):
    """What an answer of one sequence states that it took. Tokens; None: not stated."""

    prompt: int
    completion: int | None = None
    cached: int | None = None


class Prefilled(NamedTuple):
    """What a worker says it has prefilled in its life, whoever sent it."""

    requests: int
    seconds: float
    """As the latency model has them."""


class Mark(NamedTuple):
    """A moment in a worker's life: what it had been given to prefill by then, and what of it lay ahead."""

    at: float
    seconds: float
    """Of all prefills given to it, as the latency model has them."""
    prefills: int
    ahead: float
    """Seconds of prefill not answered, as the latency model has them."""
    alone: bool
    """No other router's requests are known to be there."""
    reported: Prefilled | None
    """By the worker, if it says."""
    step: float
    """Seconds until the step in progress is over, on average."""


class Lessons:
    """Samples of one worker's pace. O(1) an answer, and a few numbers of state."""

    __slots__ = (
        "_block_size",
        "_count",
        "_lasted",
        "_latency",
        "_pace",
        "_prefilled",
        "_reported",
        "_seconds",
        "_seen_at",
    )

    def __init__(self, latency: LatencyModel, block_size: int, pace: WorkerPace) -> None:
        self._latency = latency
        self._block_size = block_size
        self._pace = pace
        self._seconds = 0.0
        self._count = 0
        self._prefilled = Span(0.0, 0.0)
        self._lasted = 0.0
        self._seen_at = 0.0
        self._reported: Prefilled | None = None

    def reported(self, count: int, tokens: int) -> None:
        """The worker's own count of its prefills so far, and of the tokens computed in them; zeros: it does not say."""
        latency = self._latency
        seconds = latency.prefill_base * count + latency.prefill_block * tokens / self._block_size
        self._reported = Prefilled(count, seconds) if count else None

    def given(self, seconds: float) -> None:
        """The worker got one more prompt to prefill; seconds as the latency model has them."""
        self._seconds += seconds
        self._count += 1

    def mark(self, now: float, ahead: float, *, alone: bool, decoding: bool) -> Mark:
        """The state now. `ahead`: predicted prefill that is not answered, as the latency model has it."""
        step = self._latency.decode / 2 if decoding else 0.0
        return Mark(now, self._seconds, self._count, ahead, alone, self._reported, step)

    def forget(self) -> None:
        """What has been seen of the prefills in progress cannot be relied on."""
        self._prefilled = Span(0.0, 0.0)
        self._lasted = 0.0

    def prefilled(self, work: Span, seconds: float, now: float, *, more: bool) -> None:
        """A prefill ended `seconds` after it began. Prefills that share steps end together, so only sums over all that
        end with a step count; `more`: another one goes on."""
        self.settle(now)
        self._prefilled = Span(self._prefilled.prefill + work.prefill, self._prefilled.decode + work.decode)
        self._lasted += seconds
        self._seen_at = now
        if not more:
            self._pace.observe(self._prefilled, self._lasted, now)
            self.forget()

    def settle(self, now: float) -> None:
        """Time has passed: those that ended last did so with another step than whatever ends from now on."""
        done = self._prefilled
        if done.prefill >= self._latency.prefill(FULL_BLOCKS) and now - self._seen_at > APART * self._pace.seconds(
            done
        ):
            self._pace.observe(done, self._lasted, now)
            self.forget()

    def whole(self, sent: Mark, cost: Cost, predicted: float, now: float, *, certain: bool) -> None:
        """A whole answer to what was sent then has arrived: all that is seen of its prefill and its decoding is their
        sum. Unless it states how much of its prompt was cached, its prefill took what was `predicted`."""
        if cost.completion is None:
            return
        own, trust = predicted, 1.0 if certain else GUESSED
        if cost.cached is not None:
            own, trust = self._latency.prefill(blocks_to_compute(cost.prompt, cost.cached, self._block_size)), 1.0
        self._observe(sent, sent.ahead + own, own, cost.completion - 1, now, trust)

    def decoded(self, first_token: Mark, cost: Cost, now: float) -> None:
        """A stream whose first token came then is over."""
        if cost.completion is not None:
            self._observe(first_token, first_token.ahead, 0.0, cost.completion - 1, now, 1.0)

    def _observe(self, since: Mark, ahead: float, own: float, steps: int, now: float, trust: float) -> None:
        if steps < 0 or now <= since.at:
            return
        if since.alone:
            count, others = self._count - since.prefills, self._seconds - since.seconds
        elif since.reported is not None and self._reported is not None:
            # Others' requests are there too: what was prefilled meanwhile only the worker knows.
            count = self._reported.requests - since.reported.requests
            others = self._reported.seconds - since.reported.seconds
            if count < 0:
                return  # another life of it
            if own:  # its own is among them
                count, others = max(count - 1, 0), max(others - own, 0.0)
            ahead = own
        else:
            return
        if count > steps:  # no more prefills than steps can have held the decoding up
            count, others = steps, others * steps / count
        span = Span(ahead + others, (steps - count) * self._latency.decode + since.step)
        mine = self._pace.seconds(Span(own, (steps - count) * self._latency.decode))
        total = self._pace.seconds(span)
        if total > 0.0:
            self._pace.observe(span, now - since.at, now, trust=trust * mine / total)
