"""What the fleet accounts for one dispatched request until it ends."""

from __future__ import annotations

from collections import deque

from router.core.history import History
from router.core.index import Assumption, PrefixIndex
from router.core.latency_samples import Usage
from router.core.ledger import ENDED
from router.core.reuse import ReuseScore
from router.core.work import Expected, Work


class Assumptions:
    """Blocks of dispatched requests, assumed present on their workers until a grace period after the first byte.

    The period is the same for all, so assumptions end in the order in which their periods began: a plain queue.
    """

    __slots__ = ("_due", "_grace", "_index")

    def __init__(self, index: PrefixIndex, grace: float) -> None:
        self._index = index
        self._grace = grace
        self._due: deque[tuple[float, Assumption]] = deque()

    def confirm_by(self, assumption: Assumption, now: float) -> None:
        """The grace period, in which the feed confirms the assumed blocks, begins now."""
        self._due.append((now + self._grace, assumption))

    def give_up(self, assumption: Assumption) -> None:
        """The request never reached the worker."""
        self._index.withdraw(assumption)

    def expire(self, now: float) -> None:
        """End every assumption whose grace period is over."""
        due = self._due
        while due and due[0][0] <= now:
            self._index.withdraw(due.popleft()[1])


class Ticket:
    """One request on one worker. Its methods may be called any number of times, in any order; late calls do nothing."""

    __slots__ = (
        "_assumption",
        "_assumptions",
        "_certain",
        "_entry",
        "_expected",
        "_first",
        "_mark",
        "_matched",
        "_reuse_score",
        "_work",
        "served",
    )

    def __init__(
        self,
        work: Work,
        expected: Expected,
        assumption: Assumption | None,
        assumptions: Assumptions | History,
        reuse_score: ReuseScore,
        *,
        matched: int,
        streaming: bool,
        certain: bool,
        now: float,
    ) -> None:
        """`matched`: blocks that the prediction relies on; `certain`: the worker itself states that it holds them."""
        before = work.mark(now)
        self._entry = work.open(expected, streaming, now)
        self._mark = work.samples.marked_after_dispatch(before)
        """The state at its dispatch, not counting the request itself; later that at its first token."""
        self._certain = certain
        self._work = work
        self._expected = expected
        self._assumption = assumption
        self._assumptions = assumptions
        self._reuse_score = reuse_score
        self._matched = matched
        self._first: float | None = None
        self.served = False
        """Set by the caller once the worker has answered successfully: its cache holds the prompt."""

    @property
    def answered(self) -> bool:
        """Whether a first byte came."""
        return self._first is not None

    def first_token(self, now: float) -> None:
        """The first byte of the answer came: the prefill is over and the worker's cache holds the prompt."""
        if self._first is not None or self._entry.state is ENDED:
            return
        self._first = now
        self._work.first_token(self._entry, self._expected, now, certain=self._certain)
        self._mark = self._work.mark(now)
        self._confirm(now)

    def reported(self, prompt_tokens: int, cached_tokens: int, now: float) -> float:
        """The answer states how much of the prompt was cached. Call it once. Returns the seconds of prefill that this
        saved."""
        self._work.prompt_tokens += prompt_tokens
        self._work.cached_tokens += cached_tokens
        return self._work.saved(prompt_tokens, cached_tokens, now)

    def finished(self, now: float, usage: Usage) -> None:
        """The answer, of one sequence, is complete and states what it took. Call it before `release`."""
        if self._entry.state is ENDED:
            return
        self._work.observe_length(self._expected.kind, usage)
        if self._first is None:
            self._work.observe_decode_time(now - self._mark.at - self._expected.queue - self._expected.prefill)
            decoded = self._work.decoded(now)
            self._work.samples.answer_ended(
                self._mark, usage, self._expected.unloaded, self._work.block_size, decoded, now, certain=self._certain
            )
        else:
            self._work.samples.stream_ended(self._mark, usage, self._work.decoded(now), now)
        self._work.observed()

    def release(self, now: float, reused: bool = True) -> None:
        """The request is over. `reused=False`: it never ran on the worker (it could not be sent, or failed before its
        first byte), so its blocks are no longer assumed to be there."""
        if self._entry.state is ENDED:
            return
        self._work.close(self._entry, self._first, now)
        if reused:
            self._reuse_score.add(self._matched, now)
            self._confirm(now)
        elif self._assumption is not None:
            self._assumptions.give_up(self._assumption)
            self._assumption = None

    def _confirm(self, now: float) -> None:
        if self._assumption is not None:
            self._assumptions.confirm_by(self._assumption, now)
            self._assumption = None
