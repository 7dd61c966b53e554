"""A latency model from the times of a real engine: what `kvcluster bench --raw` recorded of it.

Prefills are fitted to the times to first token of requests that had the engine to themselves until then; decode steps
to the mean time between the tokens of each answer, given how many answers were in progress beside it and how long their
contexts were. Both are least squares, in plain Python: there are three unknowns at most. Seconds and tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from bench.record import Record
from kvcache.profiles import LatencyModel, blocks_to_compute

FEWEST = 8
"""Requests that are needed for the prefill, and for the decode step."""
FEWEST_TOKENS = 8
"""Tokens of an answer whose time between tokens counts."""
OUTLIER = 4.0
"""Samples that are further from the fit than this many median deviations are left out of a second one."""
TOGETHER = 0.2
"""First tokens that are less than this share of a decode step apart ended with the same step."""
PASSES = 4
"""Which steps an answer had depends a little on how long steps take: each pass starts from the last one's result."""
ALIKE = 1e-3
"""Two columns are told apart if what one has beyond the other is more than this share of it."""


class FitError(ValueError):
    """The records do not tell the speed of an engine. The message says what is missing and how to record it."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well a latency model describes recorded runs."""

    prefills: int
    """Requests that had the engine to themselves until their first token."""
    prefill_error: float
    """Median of |predicted / observed - 1| of their times to first token."""
    answers: int
    """Answers that are long enough, and of whose steps most computed no prompt."""
    decode_error: float
    """The same of their decode steps."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answered request."""

    sent: float
    first: float
    end: float
    prompt: int
    cached: int
    tokens: int

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    def context(self, begin: float, end: float) -> float:
        """Its mean tokens of context between two moments while it was in progress."""
        return self.prompt + self.tokens * ((begin + end) / 2 - self.first) / (self.end - self.first)


def fit_latency(runs: Iterable[Iterable[Record]], start: LatencyModel) -> LatencyModel:
    """The latency model of the engines that answered these runs, all equally fast. What no record tells (the time of a
    prompt that is cached entirely) is taken from `start`. Raises `FitError`."""
    engines = _by_engine(runs)
    latency = _fit_prefill(_undisturbed(engines), start)
    for _ in range(PASSES):
        latency = _fit_decode(_steps(engines, latency), latency)
    return latency


def agreement(runs: Iterable[Iterable[Record]], latency: LatencyModel) -> Agreement:
    """How well the model describes these runs, which it need not have been fitted to. Raises `FitError` if they hold
    nothing to compare it with."""
    engines = _by_engine(runs)
    prefills, steps = _undisturbed(engines), _steps(engines, latency)
    if not prefills or not steps:
        raise FitError("the records hold no prefill or no answer that can be compared with a latency model")
    decode = (latency.decode, latency.decode_sequence, latency.decode_token)
    return Agreement(
        prefills=len(prefills),
        prefill_error=median(abs(_prefill(latency, answer) / answer.ttft - 1) for answer in prefills),
        answers=len(steps),
        decode_error=median(abs(_value(decode, row) / seconds - 1) for row, seconds, _ in steps),
    )


def _by_engine(runs: Iterable[Iterable[Record]]) -> list[list[_Answer]]:
    engines: dict[tuple[int, str], list[_Answer]] = defaultdict(list)
    for number, records in enumerate(runs):
        for r in records:
            if r.error is None and r.first_token is not None and r.finished is not None and r.prompt_tokens:
                cached, output = r.cached_tokens or 0, r.output_tokens or 1
                engines[number, r.worker].append(
                    _Answer(r.sent, r.first_token, r.finished, r.prompt_tokens, cached, output)
                )
    return [sorted(answers, key=lambda answer: answer.sent) for answers in engines.values()]


# --- prefill ------------------------------------------------------------------------------------------------------


def _undisturbed(engines: Iterable[Sequence[_Answer]]) -> list[_Answer]:
    """Those before whose first token nothing else was on the engine."""
    return [
        one
        for answers in engines
        for one in answers
        if not any(other is not one and other.sent < one.first and other.end > one.sent for other in answers)
    ]


def _blocks(answer: _Answer, latency: LatencyModel) -> int:
    return blocks_to_compute(answer.prompt, answer.cached, latency.block_size)


def _prefill(latency: LatencyModel, answer: _Answer) -> float:
    return latency.prefill(_blocks(answer, latency))


def _fit_prefill(answers: Sequence[_Answer], start: LatencyModel) -> LatencyModel:
    computed = [answer for answer in answers if _blocks(answer, start)]
    cached = [answer.ttft for answer in answers if not _blocks(answer, start)]
    sizes = {_blocks(answer, start) for answer in computed}
    if len(computed) < FEWEST or len(sizes) < 2:
        raise FitError(
            f"{len(computed)} requests had the engine to themselves and computed prompts of {len(sizes)} lengths: at "
            f"least {FEWEST} and 2 are needed. Record some at a low rate, say with `kvcluster bench URL --workload "
            "uniform --rate 0.5 --raw idle.jsonl`, and give both files"
        )
    rows = [([1.0, float(_blocks(answer, start))], answer.ttft, 1.0) for answer in computed]
    base, block = _robust(rows)
    if not block > 0:
        raise FitError(
            "times to first token do not grow with the blocks that are computed: record prompts that differ more"
        )
    return replace(
        start, prefill_base=base, prefill_block=block, prefill_cached=median(cached) if cached else start.prefill_cached
    )


# --- decode -------------------------------------------------------------------------------------------------------

_Row = tuple[list[float], float, float]
"""The values of the columns, the seconds observed, and the weight."""


def _steps(engines: Iterable[Sequence[_Answer]], latency: LatencyModel) -> list[_Row]:
    """Of each answer that is long enough: how many were decoded in its steps, with how much context, and how long a
    step took that computed no prompt. Means over its steps, as long as `latency` says that they are."""
    rows: list[_Row] = []
    for one, engine in ((one, answers) for answers in engines for one in answers):
        if one.tokens < FEWEST_TOKENS or one.end <= one.first:
            continue
        beside = [other for other in engine if other.first < one.end and other.end > one.first]
        times = sorted({min(max(at, one.first), one.end) for other in beside for at in (other.first, other.end)})
        steps = sequences = context = 0.0
        for begin, end in pairwise(times):
            there = [other for other in beside if other.first <= begin and other.end >= end]
            contexts = sum(other.context(begin, end) for other in there)
            fitted = (end - begin) / latency.decode_step(len(there), contexts)
            steps += fitted
            sequences += fitted * len(there)
            context += fitted * contexts
        sequences, context = sequences / steps, context / steps
        mixed = _mixed_steps(one, beside, latency, latency.decode_step(round(sequences), context))
        decoded, seconds = one.tokens - 1 - len(mixed), one.end - one.first - sum(mixed)
        if decoded >= one.tokens / 2 and seconds > 0:
            rows.append(([1.0, sequences, context], seconds / decoded, float(decoded)))
    return rows


def _mixed_steps(one: _Answer, beside: Iterable[_Answer], latency: LatencyModel, step: float) -> list[float]:
    """Seconds of each step of `one` that took longer than a decode `step`, because it computed prompts too. Prompts
    whose first tokens come together were computed in one step."""
    ends: list[float] = []
    seconds: list[float] = []
    for other in sorted(beside, key=lambda other: other.first):
        if not one.first < other.first < one.end:
            continue
        if ends and other.first - ends[-1] < TOGETHER * step:
            seconds[-1] += _prefill(latency, other)
        else:
            ends.append(other.first)
            seconds.append(_prefill(latency, other))
    return [each for each in seconds if each > step]


def _fit_decode(samples: Sequence[_Row], latency: LatencyModel) -> LatencyModel:
    if len(samples) < FEWEST:
        raise FitError(
            f"{len(samples)} answers have {FEWEST_TOKENS} tokens or more and few prefills beside them: at least "
            f"{FEWEST} are needed. Record some under load, say with `kvcluster bench URL --workload answers --raw "
            "busy.jsonl`"
        )
    decode, sequence, token = _robust(samples)
    return replace(latency, decode=decode, decode_sequence=sequence, decode_token=token)


# --- least squares ------------------------------------------------------------------------------------------------


def _robust(rows: Sequence[_Row]) -> list[float]:
    """Least squares with coefficients of 0 or more, and again without outliers."""
    found = _non_negative(rows)
    misses = [abs(_value(found, row) - seconds) for row, seconds, _ in rows]
    limit = OUTLIER * median(misses)
    kept = [row for row, miss in zip(rows, misses, strict=True) if miss <= limit]
    return _non_negative(kept) if len(kept) >= FEWEST else found


def _value(coefficients: Sequence[float], row: Sequence[float]) -> float:
    return sum(coefficient * x for coefficient, x in zip(coefficients, row, strict=True))


def _non_negative(rows: Sequence[_Row]) -> list[float]:
    """The best coefficients, each 0 or more: the smallest error over all choices of columns that get one. Of columns
    that cannot be told apart, the last gets the coefficient."""
    width = len(rows[0][0])
    best, least = [0.0] * width, float("inf")
    for choice in range((1 << width) - 1, 0, -1):
        columns = [column for column in range(width) if choice >> column & 1]
        found = _solve(rows, columns)
        if found is None or min(found) < 0:
            continue
        full = [0.0] * width
        for column, coefficient in zip(columns, found, strict=True):
            full[column] = coefficient
        error = sum(weight * (_value(full, row) - seconds) ** 2 for row, seconds, weight in rows)
        if error < least * (1 - ALIKE):
            best, least = full, error
    return best


def _solve(rows: Sequence[_Row], columns: Sequence[int]) -> list[float] | None:
    """Normal equations by elimination; None: the columns cannot be told apart."""
    size = len(columns)
    matrix = [
        [sum(w * row[a] * row[b] for row, _, w in rows) for b in columns] + [sum(w * row[a] * y for row, y, w in rows)]
        for a in columns
    ]
    for at in range(size):
        whole = sum(w * row[columns[at]] ** 2 for row, _, w in rows)
        if matrix[at][at] <= ALIKE * whole:
            return None
        for below in range(at + 1, size):
            ratio = matrix[below][at] / matrix[at][at]
            for column in range(at, size + 1):
                matrix[below][column] -= ratio * matrix[at][column]
    found = [0.0] * size
    for at in reversed(range(size)):
        rest = sum(matrix[at][column] * found[column] for column in range(at + 1, size))
        found[at] = (matrix[at][size] - rest) / matrix[at][at]
    return found
