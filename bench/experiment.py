"""Experiments: a workload under several contenders, repeated, or at several rates in search of the highest that meets
an SLO. A contender is a routing strategy or another router; how it is run, live or simulated, is a `Play`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from bench.estimates import MOST_REPEATS, Estimate, difference, estimate
from bench.figures import BY_NAME
from bench.rate_search import Bracket, SearchOptions, find_rate
from bench.record import Record
from bench.result import Measurement, Result, RunInfo, summarise
from bench.workloads import TimedRequest, Workload, WorkloadError, WorkloadSpec, build_workload


@dataclass(frozen=True, slots=True)
class Played:
    """What running a workload once gave."""

    records: Sequence[Record]
    info: RunInfo


Play = Callable[[str, WorkloadSpec], Awaitable[Played]]
"""Runs a workload under the contender of this name, with cold caches where that is possible."""


@dataclass(frozen=True, slots=True)
class ExperimentOptions:
    """What is done with a workload. Raises `ValueError` for a number of repeats that cannot be."""

    workload: WorkloadSpec
    measurement: Measurement = field(default_factory=Measurement)
    repeats: int = 1
    """Each with a seed of its own: that of the workload, and those after it."""
    search: SearchOptions | None = None
    """None: the workload is played at its own rate."""

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= MOST_REPEATS:
            raise ValueError(f"--repeats must be between 1 and {MOST_REPEATS}, not {self.repeats}")

    @property
    def seeds(self) -> range:
        """Of the repeats."""
        return range(self.workload.seed, self.workload.seed + self.repeats)

    def check(self) -> None:
        """Raises `WorkloadError` for a workload that cannot be built or that the warm-up leaves nothing of."""
        workload = build_workload(self.workload)
        warm_up = self.measurement.warm_up
        if warm_up.requests >= workload.count:
            raise WorkloadError(f"a warm-up of {warm_up} leaves none of the {workload.count:,} to measure")

    def counts(self, request: TimedRequest) -> bool:
        """Whether this request of a workload is measured."""
        return self.measurement.warm_up.over(request.index, request.at)

    def ceiling(self, of: Callable[[Workload], float]) -> float:
        """The mean, over the seeds, of a hit rate that follows from the requests of a workload."""
        return fmean(of(build_workload(replace(self.workload, seed=seed))) for seed in self.seeds)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one contender."""

    contender: str
    seed: int
    rate: float | None
    """Requests a second, where a search set it."""
    result: Result


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate that a search tried. Means over the repeats."""

    rate: float
    attainment: float
    goodput: float
    met: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found for one contender."""

    options: SearchOptions
    bracket: Bracket
    probes: Sequence[Probe]
    """In the order of their rates."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that one contender did."""

    contender: str
    runs: Sequence[Run]
    """One for each seed. After a search: those at the highest rate that met the SLO, else at the lowest that was
    tried."""
    found: Found | None = None

    @property
    def results(self) -> list[Result]:
        """Of the runs."""
        return [run.result for run in self.runs]

    def estimate(self, figure: str) -> Estimate | None:
        """The mean of a figure over the runs, and its confidence interval."""
        return estimate([BY_NAME[figure].of(result) for result in self.results])

    def mean(self, figure: str) -> float | None:
        """The mean of a figure over the runs; None: it has none."""
        found = self.estimate(figure)
        return None if found is None else found.mean

    def versus(self, other: Outcome, figure: str) -> Estimate | None:
        """This contender's figure minus the other's, seed by seed; None after a search, whose rates differ."""
        if self.found is not None or other.found is not None:
            return None
        of = BY_NAME[figure].of
        return difference([of(result) for result in self.results], [of(result) for result in other.results])


Keep = Callable[[Run, Sequence[Record]], None]
"""Called with each run as soon as it ended, so that a later failure loses nothing."""


async def repeat(play: Play, contenders: Sequence[str], options: ExperimentOptions, keep: Keep) -> list[Outcome]:
    """Run every contender with every seed. All contenders run with one seed before the next, so that what changes on
    the machine meanwhile touches all of them. Raises what `play` raises."""
    runs: dict[str, list[Run]] = {contender: [] for contender in contenders}
    for seed in options.seeds:
        for contender in contenders:
            runs[contender].append(await _run(play, contender, replace(options.workload, seed=seed), options, keep))
    return [Outcome(contender, of_one) for contender, of_one in runs.items()]


async def _run(play: Play, contender: str, spec: WorkloadSpec, options: ExperimentOptions, keep: Keep) -> Run:
    played = await play(contender, spec)
    result = summarise(played.records, played.info, options.measurement)
    run = Run(contender, spec.seed, spec.rate if options.search is not None else None, result)
    keep(run, played.records)
    return run


async def search(
    play: Play, contenders: Sequence[str], options: ExperimentOptions, search: SearchOptions, keep: Keep
) -> list[Outcome]:
    """Find the highest rate at which each contender meets the SLO. Raises what `play` raises."""
    start = options.workload.rate or build_workload(options.workload).config.get("rate") or 1.0
    outcomes = []
    for contender in contenders:
        runs: dict[float, list[Run]] = {}

        async def meets(rate: float, contender: str = contender, runs: dict[float, list[Run]] = runs) -> bool:
            specs = [replace(options.workload, rate=rate, time_scale=None, seed=seed) for seed in options.seeds]
            runs[rate] = [await _run(play, contender, spec, options, keep) for spec in specs]
            return _probe(rate, runs[rate], search).met

        bracket = await find_rate(meets, float(start), search.tolerance)
        probes = [_probe(rate, runs[rate], search) for rate in sorted(runs)]
        shown = min(runs) if bracket.passed is None else bracket.passed
        outcomes.append(Outcome(contender, runs[shown], Found(search, bracket, probes)))
    return outcomes


def _probe(rate: float, runs: Sequence[Run], search: SearchOptions) -> Probe:
    goodputs = [run.result.goodput for run in runs if run.result.goodput is not None]
    attainment = fmean(goodput.attainment for goodput in goodputs) if goodputs else 0.0
    goodput = fmean(goodput.requests_per_second for goodput in goodputs) if goodputs else 0.0
    return Probe(rate, attainment, goodput, attainment >= search.attainment)


async def conduct(play: Play, contenders: Sequence[str], options: ExperimentOptions, keep: Keep) -> list[Outcome]:
    """Repeat, or search, as the options say. Raises what `play` raises."""
    if options.search is None:
        return await repeat(play, contenders, options, keep)
    measured = replace(options, measurement=replace(options.measurement, slo=options.search.slo))
    return await search(play, contenders, measured, options.search, keep)
