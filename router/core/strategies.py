"""Which workers a request may go to, and the rules that pick one of them: one function each, named in `STRATEGIES`.

A strategy is pure: it sees the candidates' figures (at least two of them) and returns one of them; `REASONS` says why.
`docs/routing.md` states each with its formula and limits. To add one, write the function and name it in `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from router.core.decision import Candidate, DecisionReason
from router.core.worker import Worker
from router.core.worker_state import WorkerPhase

_TIERS: Mapping[WorkerPhase, int] = {
    WorkerPhase.SERVING: 0,
    WorkerPhase.HALF_OPEN: 0,
    WorkerPhase.DRAINING: 1,
    WorkerPhase.PAUSED: 2,
    WorkerPhase.EJECTED: 3,
}
_HALF_OPEN = WorkerPhase.HALF_OPEN


def candidates(workers: Iterable[Worker], exclude: Collection[str] = ()) -> list[Worker]:
    """The workers that a request not yet sent to any of `exclude` (URLs) may go to, in the order given.

    These are the workers that serve; if there are none, those that drain; if no worker serves at all, those that are
    paused, and if there are none of these either, those that are ejected. A request that failed at every worker that
    serves does not go to one that is paused or ejected, because these are left out for a reason.
    """
    tiers: tuple[list[Worker], ...] = ([], [], [], [])
    for worker in workers:
        phase = worker.phase
        tier = _TIERS.get(phase)
        if tier is None:
            continue
        if phase is _HALF_OPEN and worker.work.ledger.in_flight:
            tier = 3  # the probe that it may get is under way
        tiers[tier].append(worker)
    for tier_workers in tiers[:2] if tiers[0] else tiers:
        left = [worker for worker in tier_workers if worker.url not in exclude] if exclude else tier_workers
        if left:
            return left
    return []


def of_rank(workers: Collection[Worker], rank: int | None) -> Collection[Worker]:
    """Of these workers those with the data-parallel rank that a request asks for; all of them if it asks for none, or
    if none has it: the worker that gets the request then refuses it in the engine's own words."""
    if rank is None:
        return workers
    return [worker for worker in workers if worker.rank == rank] or workers


class Conditions(NamedTuple):
    """What a strategy has to know besides the candidates."""

    matchable: bool
    """Whether there was a prefix to match."""
    tie_seconds: float
    """Costs that differ by no more than this are equal: the estimate is not more precise."""
    session_url: str | None = None
    """The worker that got the last request of the same session; None if there is none, or it does not matter."""
    session_hint: bool = False
    """The session is only hinted at."""
    block_seconds: float = 1.0
    """Seconds of computing one block of a prompt."""
    spreading: bool = False
    """Whether the longest match is one that further workers should have too."""


Strategy = Callable[[Sequence[Candidate], Conditions], Candidate]


class UnknownStrategyError(ValueError):
    """No strategy has this name. The message lists those that exist."""


def cache_aware(candidates: Sequence[Candidate], conditions: Conditions) -> Candidate:
    """The smallest cost. Ties: the longest match (unless it is to be spread), then the worker of the session, then the
    least work assigned lately, then the fewest requests in flight, then the longest unused."""
    bound = min(candidate.cost for candidate in candidates) + conditions.tie_seconds
    tied = [candidate for candidate in candidates if candidate.cost <= bound]
    url = conditions.session_url
    if url is not None and conditions.session_hint:
        # What shares a hint may be a whole application's traffic: it stays together only while nobody waits for it.
        fewest = min(candidate.in_flight for candidate in tied)
        url = url if any(c.url == url and c.in_flight == fewest for c in tied) else None
    match = 0 if conditions.spreading else -1
    return min(tied, key=lambda c: (match * c.matched_blocks, c.url != url, c.assigned_seconds, c.in_flight, c.turn))


def longest_prefix(candidates: Sequence[Candidate], conditions: Conditions) -> Candidate:
    """The textbook rule: the longest match, whatever the load. Workers with equal matches, or none, take turns."""
    longest = max(candidate.matched_blocks for candidate in candidates)
    return min((c for c in candidates if c.matched_blocks == longest), key=lambda c: c.turn)


def round_robin(candidates: Sequence[Candidate], conditions: Conditions) -> Candidate:
    """In turn: the worker whose last request was the longest ago."""
    return min(candidates, key=lambda c: c.turn)


def least_loaded(candidates: Sequence[Candidate], conditions: Conditions) -> Candidate:
    """The fewest requests in flight. Workers with equal numbers take turns."""
    return min(candidates, key=lambda c: (c.in_flight, c.turn))


def lmetric(candidates: Sequence[Candidate], conditions: Conditions) -> Candidate:
    """The smallest product of the prefill to come (queued and the request's own) and the requests then on the worker
    (Zhang et al., "LMetric", arXiv 2603.15202). Workers with equal products take turns."""

    def score(c: Candidate) -> float:
        return (c.queue_seconds - c.memory_seconds + c.prefill_seconds) * (c.in_flight + 1)

    return min(candidates, key=lambda c: (score(c), c.turn))


def linear(candidates: Sequence[Candidate], conditions: Conditions) -> Candidate:
    """The smallest sum of blocks to prefill (queued and the request's own) and blocks in use once the request runs:
    NVIDIA Dynamo's rule with its default weight of 1 and no randomness. Workers with equal sums take turns."""

    def score(c: Candidate) -> float:
        prefill = c.queue_seconds - c.memory_seconds + c.prefill_seconds
        return prefill / conditions.block_seconds + c.active_blocks

    return min(candidates, key=lambda c: (score(c), c.turn))


def reason(strategy: Strategy, matched: int, longest: int, *, matchable: bool) -> DecisionReason:
    """Why this strategy chose a candidate that holds `matched` blocks of the prompt, of which any holds `longest` at
    most. `matchable`: whether there was a prefix to match."""
    given = REASONS[strategy]
    if given is not DecisionReason.PREFIX_MATCH and given is not DecisionReason.LONGEST_PREFIX:
        return given
    if not longest:
        return DecisionReason.NO_MATCH if matchable else DecisionReason.NO_PREFIX
    return given if matched == longest else DecisionReason.LOAD_OVER_PREFIX


STRATEGIES: Mapping[str, Strategy] = {
    "cache_aware": cache_aware,
    "longest_prefix": longest_prefix,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "lmetric": lmetric,
    "linear": linear,
}

REASONS: Mapping[Strategy, DecisionReason] = {
    cache_aware: DecisionReason.PREFIX_MATCH,
    longest_prefix: DecisionReason.LONGEST_PREFIX,
    round_robin: DecisionReason.ROUND_ROBIN,
    least_loaded: DecisionReason.LEAST_LOADED,
    lmetric: DecisionReason.LMETRIC,
    linear: DecisionReason.LINEAR,
}
"""The reason that each strategy gives; those that look for a match give it where they found the longest one."""


def find_strategy(name: str) -> Strategy:
    """The strategy of this name. Raises `UnknownStrategyError`."""
    try:
        return STRATEGIES[name]
    except KeyError:
        raise UnknownStrategyError(f"unknown strategy {name!r}; use one of: {', '.join(sorted(STRATEGIES))}") from None
