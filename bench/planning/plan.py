"""A plan: the smallest cluster of each profile that meets an SLO under a workload, what it costs, and what it bears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.numbers import milliseconds, percent, seconds
from bench.planning.limits import Floor, Limit, floor_of
from bench.planning.search import smallest
from bench.planning.trial import Target, Trial, trial_of
from bench.report import TOLERATED_ERRORS
from bench.simulation.play import Play, asked, play_out
from bench.simulation.processes import Processes
from bench.simulation.sweep import with_profile
from bench.workloads import build_workload

HEADROOM = (1.1, 1.25, 1.5, 2.0, 3.0)
"""Times the workload's rate, to find out what the planned cluster still bears."""
FLAT = 0.02
"""More workers no longer help if twice as many better a time by less than this share."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the planned cluster bears, in requests a second for each worker."""

    rate_met: float
    """The highest rate tried up to which the target is met."""
    rate_missed: float | None
    """The lowest rate tried at which it is missed; None: it was met at all."""
    in_flight: float
    """Requests that a worker has at a time, at `rate_met`."""


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """What was found out about one profile."""

    profile: str
    price: float | None
    """US dollars for an hour of one worker."""
    workers: int | None
    """The recommendation; None: the target cannot be met."""
    trials: Sequence[Trial]
    """By workers."""
    floor: Floor | None
    """None: no worker takes any request."""
    limit: Limit | None = None
    why: str = ""
    """What binds, and what would help; empty if the target is met."""
    capacity: Capacity | None = None

    @property
    def chosen(self) -> Trial | None:
        """The recommended cluster."""
        return next((trial for trial in self.trials if trial.workers == self.workers), None)

    @property
    def dollars_an_hour(self) -> float | None:
        """What the recommended cluster costs."""
        return None if self.price is None or self.workers is None else self.price * self.workers


@dataclass(frozen=True, slots=True)
class Plan:
    """The plans of all profiles, and which is best."""

    target: Target
    workload: str
    asked_rate: float | None
    """Requests a second that the workload was asked for; those that it drew are each trial's. None: its own."""
    profiles: Sequence[ProfilePlan]
    best: str | None
    """The profile whose cluster costs least (or, without prices for all, has the fewest workers); None: no target is
    met."""


def _trial(play: Play) -> Trial:
    """Run one cluster. A function of the module, because other processes call it."""
    _, records = play_out(play)
    return trial_of(records, play.shape.workers)


@dataclass(frozen=True, slots=True)
class Planner:
    """How to plan: with the simulation `play`, whose number of workers is varied."""

    play: Play
    target: Target
    processes: Processes
    most: int = 64
    """Workers at most."""
    tried: Callable[[int], None] = lambda trials: None
    """Called with the number of simulations that have just ended."""

    def plan(self, profile: str, price: float | None = None, own: str = "") -> ProfilePlan:
        """The plan for workers of this profile; `own` is that of the simulation, which may differ from the profile in
        its number of blocks, say. Raises `ValueError` for an unknown profile, and what `play_out` raises."""
        play = self.play
        if profile != own:
            play = replace(play, shape=with_profile(play.shape, profile))
        floor = floor_of(asked(build_workload(play.workload), play.shape), play.shape, play.delays, self.most)
        impossible = self._impossible(play, floor)
        if impossible is not None:
            return ProfilePlan(profile, price, None, (), floor, *impossible)
        trials: dict[int, Trial] = {}

        def try_out(numbers: Sequence[int]) -> list[bool]:
            plays = [_with(play, workers) for workers in numbers]
            trials.update(zip(numbers, self.processes.map(_trial, plays), strict=True))
            self.tried(len(plays))
            return [trials[number].met(self.target) for number in numbers]

        workers = smallest(try_out, self.most, self.processes.jobs)
        ordered = [trials[number] for number in sorted(trials)]
        if workers is None:
            return ProfilePlan(profile, price, None, ordered, floor, Limit.MOST_WORKERS, self._too_few(ordered))
        capacity = self._capacity(play, trials[workers])
        return ProfilePlan(profile, price, workers, ordered, floor, capacity=capacity)

    def _impossible(self, play: Play, floor: Floor | None) -> tuple[Limit, str] | None:
        """Why no number of workers will do, as far as that is clear without a simulation."""
        longest = play.shape.engine.max_model_len
        if floor is None or floor.refused_share > TOLERATED_ERRORS:
            share = "all" if floor is None else percent(floor.refused_share)
            return Limit.CONTEXT, (
                f"{share} of the requests are longer than the context of {longest:,} tokens and are refused; a "
                f"longer maxModelLen (with the memory for it), or another profile, would help"
            )
        ttft, tpot = self.target.ttft_p95, self.target.tpot_p95
        if ttft is not None and floor.ttft_p95 > ttft:
            best = seconds(floor.ttft_p95)
            return Limit.TTFT_ALONE, (
                f"TTFT p95 is {best} at best: an idle worker takes that long to compute the {floor.ttft_p95_tokens:,} "
                "tokens which the prompt at that percentile has left when all that came before is cached (the longest "
                f"prompt has {floor.longest_prompt:,}); a faster profile, shorter prompts or a bound above {best} "
                "would help, more workers do not"
            )
        if tpot is not None and floor.tpot_p95 > tpot:
            best = milliseconds(floor.tpot_p95)
            return Limit.TPOT_ALONE, (
                f"TPOT p95 is {best} at best: a worker takes that long for a token of an answer that it decodes alone; "
                f"a faster profile or a bound above {best} would help, more workers do not"
            )
        return None

    def _too_few(self, trials: Sequence[Trial]) -> str:
        """What misses with the most workers, and whether more of them would help."""
        last = trials[-1]
        half = next((trial for trial in trials if 2 * trial.workers >= last.workers), last)
        said = [
            miss
            for miss in (
                _miss(
                    "TTFT", self.target.ttft_p95, last.slowest_ttft_p95, half.slowest_ttft_p95, last.workers, seconds
                ),
                _miss("TPOT", self.target.tpot_p95, last.tpot_p95, half.tpot_p95, last.workers, milliseconds),
            )
            if miss
        ]
        if last.failed > TOLERATED_ERRORS * last.requests:
            said.append(f"{last.failed:,} of {last.requests:,} requests fail with {last.workers} workers")
        return "; ".join(said) or f"no number of workers up to {last.workers} meets the target with its neighbours"

    def _capacity(self, play: Play, chosen: Trial) -> Capacity | None:
        """How much more the chosen cluster bears: the same workload at higher rates."""
        if not chosen.rate:
            return None
        # What is asked for, and not what was drawn: the drawn rate is above or below it by the same factor each time.
        asked = play.workload.rate or chosen.rate
        plays = [_with(play, chosen.workers, factor * asked) for factor in HEADROOM]
        tried = self.processes.map(_trial, plays)
        self.tried(len(plays))
        best, missed = chosen, None
        for trial in tried:
            if not trial.met(self.target):
                missed = trial.rate
                break
            best = trial
        return Capacity(best.rate / chosen.workers, None if missed is None else missed / chosen.workers, best.in_flight)


def _miss(
    name: str,
    bound: float | None,
    time: float | None,
    with_half: float | None,
    workers: int,
    shown: Callable[[float], str],
) -> str:
    """What is said of a bound that `workers` workers miss; empty if they meet it."""
    if bound is None or time is None or time <= bound:
        return ""
    said = f"{name} p95 is {shown(time)} with {workers} workers, the most that were allowed, and "
    if with_half is not None and time < (1 - FLAT) * with_half:
        return said + "falls with more of them: raise --max-workers"
    return said + (
        "no longer falls with more of them: requests that meet on one worker take that long, so a faster profile or a "
        "higher bound would help"
    )


def _with(play: Play, workers: int, rate: float | None = None) -> Play:
    workload = play.workload if rate is None else replace(play.workload, rate=rate)
    return replace(play, shape=replace(play.shape, workers=workers), workload=workload)


def make_plan(planner: Planner, profiles: Sequence[str], prices: Mapping[str, float], own: str) -> Plan:
    """Plan each profile, and say which is best. Raises what `Planner.plan` raises."""
    plans = [planner.plan(name, prices.get(name), own) for name in profiles]
    workload = build_workload(planner.play.workload)
    return Plan(planner.target, workload.name, planner.play.workload.rate, plans, best_of(plans))


def best_of(plans: Sequence[ProfilePlan]) -> str | None:
    """The profile whose cluster costs least or, unless all have a price, has the fewest workers; None: none is met."""
    met = [each for each in plans if each.workers is not None]
    if all(each.price is not None for each in met):
        best = min(met, key=lambda each: each.dollars_an_hour or 0.0, default=None)
    else:
        best = min(met, key=lambda each: each.workers or 0, default=None)
    return best.profile if best is not None else None
