"""How well a finished live run agrees with the latency model.

The requests are played again in virtual time, through one engine for each worker: each request at the moment at which
it was sent, to the worker that served it, with the length of its answer. The difference between the measured and the
modelled time to first token is what the real processes added: sockets, tokenising, Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from bench.numbers import percent, seconds
from bench.prompts import Prompt
from bench.record import Record
from bench.result import Summary, quantile, summary
from bench.simulation import ClusterShape, SeededTokens
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.request import EngineRequest

RELATIVE_TOLERANCE = 0.05
ABSOLUTE_TOLERANCE = 0.003
"""Seconds. A time agrees with the latency model if it lies within 5 % + 3 ms of it."""


@dataclass(frozen=True, slots=True)
class Modelled:
    """The time to first token of one request, measured and modelled. Emulated seconds."""

    index: int
    worker: str
    measured: float
    modelled: float

    @property
    def relative_error(self) -> float:
        """Positive if the measured time is longer."""
        return (self.measured - self.modelled) / self.modelled

    def within(self, relative: float, absolute: float) -> bool:
        """Whether the two differ by at most `relative` of the modelled time and `absolute` seconds."""
        return abs(self.measured - self.modelled) <= relative * self.modelled + absolute


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well a live run agrees with the latency model."""

    requests: int
    measured: Summary
    modelled: Summary
    relative_error_p50: float
    """Median of the absolute values."""
    relative_error_p95: float
    within: float
    """Share of the requests within `RELATIVE_TOLERANCE` + `ABSOLUTE_TOLERANCE`."""
    quantiles_within: bool
    """Whether p50, p95 and p99 of the measured times are within it too."""


def replay(records: Iterable[Record], prompts: Iterable[Prompt], shape: ClusterShape) -> list[Modelled]:
    """The modelled time to first token of every answered request. `prompts` are those of the same workload.

    The engines get only the requests that were answered; an unanswered one, which may have cost a worker time, is
    missing.
    """
    answered = {r.index: r for r in records if r.error is None and r.ttft is not None}
    engines: dict[str, Engine] = {}
    first_tokens: dict[str, float] = {}
    by_sending = sorted(
        (prompt for prompt in prompts if prompt.request.index in answered),
        key=lambda prompt: answered[prompt.request.index].sent,
    )
    for prompt in by_sending:
        record = answered[prompt.request.index]
        engine = engines.setdefault(record.worker, Engine(shape.engine, shape.latency))
        _collect(engine, record.sent, first_tokens)
        engine.submit(
            EngineRequest(
                request_id=str(record.index),
                prompt=prompt.tokens,
                max_tokens=record.output_tokens or prompt.request.max_tokens,
                source=SeededTokens(record.index),
                scope=prompt.scope,
                ignore_eos=True,
            ),
            record.sent,
        )
    for engine in engines.values():
        while (due := engine.next_event()) is not None:
            _collect(engine, due, first_tokens)
    return [
        Modelled(r.index, r.worker, r.ttft, first_tokens[str(r.index)] - r.sent)
        for r in answered.values()
        if r.ttft is not None
    ]


def _collect(engine: Engine, now: float, first_tokens: dict[str, float]) -> None:
    for output in engine.advance(now):
        if output.index == 0:
            first_tokens[output.request_id] = output.at
    engine.take_events()
    engine.take_finished()


def agreement(modelled: Sequence[Modelled]) -> Agreement:
    """The figures of a replay. Raises `ValueError` if no request was answered."""
    errors = sorted(abs(each.relative_error) for each in modelled)
    measured, predicted = summary(m.measured for m in modelled), summary(m.modelled for m in modelled)
    if measured is None or predicted is None:
        raise ValueError("no request of this run was answered, so there is nothing to compare with the latency model")
    pairs = ((measured.p50, predicted.p50), (measured.p95, predicted.p95), (measured.p99, predicted.p99))
    return Agreement(
        requests=len(modelled),
        measured=measured,
        modelled=predicted,
        relative_error_p50=quantile(errors, 0.5),
        relative_error_p95=quantile(errors, 0.95),
        within=sum(m.within(RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE) for m in modelled) / len(modelled),
        quantiles_within=all(abs(a - b) <= RELATIVE_TOLERANCE * b + ABSOLUTE_TOLERANCE for a, b in pairs),
    )


@dataclass(frozen=True, slots=True)
class Overhead:
    """What live processes add to the modelled time to first token: `fixed + token * prompt tokens`, in emulated
    seconds."""

    fixed: float
    token: float

    @property
    def network(self) -> float:
        """The fixed part one way, as `bench.simulation.Delays` has it."""
        return self.fixed / 2


def overhead(modelled: Sequence[Modelled], records: Iterable[Record]) -> Overhead:
    """The overhead of a run under little load, by the medians of Theil and Sen, which a few outliers do not move: under
    load, requests that come a little later miss the start of a step, and what is measured is no longer the overhead.

    O(n^2). Raises `ValueError` if no request was answered.
    """
    lengths = {record.index: record.prompt_tokens or 0 for record in records}
    points = [(lengths[each.index], each.measured - each.modelled) for each in modelled]
    if not points:
        raise ValueError("no request of this run was answered, so there is nothing to measure")
    slopes = sorted(
        (second - first) / (more - less)
        for at, (less, first) in enumerate(points)
        for more, second in points[at + 1 :]
        if more != less
    )
    token = max(quantile(slopes, 0.5), 0.0) if slopes else 0.0
    fixed = quantile(sorted(extra - token * length for length, extra in points), 0.5)
    if fixed < 0:
        # Lengths too much alike to tell the parts apart: what is kept is the overhead at the lengths that there are.
        return Overhead(0.0, max(quantile(sorted(extra / max(length, 1) for length, extra in points), 0.5), 0.0))
    return Overhead(fixed, token)


def print_overhead(console: Console, found: Overhead) -> None:
    """Print it, and how a simulation counts it in."""
    console.print(
        f"beside the model: {found.fixed * 1e3:.2f} ms and {found.token * 1e6:.3f} us a prompt token; under little "
        f"load that is what processes add: simulate --network-delay {found.network:.6f} --token-delay {found.token:.9f}"
    )


def print_agreement(console: Console, figures: Agreement) -> None:
    """Print the figures as sentences."""
    for name in ("p50", "p95", "p99"):
        measured, modelled = getattr(figures.measured, name), getattr(figures.modelled, name)
        console.print(f"TTFT {name}: measured {seconds(measured)}, by the latency model {seconds(modelled)}")
    console.print(
        f"{percent(figures.within)} of {figures.requests:,} requests within {RELATIVE_TOLERANCE:.0%} + "
        f"{ABSOLUTE_TOLERANCE * 1e3:.0f} ms of the model; relative error p50 {percent(figures.relative_error_p50)}, "
        f"p95 {percent(figures.relative_error_p95)}; "
        f"{'all' if figures.quantiles_within else 'not all'} of p50, p95 and p99 are within"
    )
