"""A plan as a table, sentences, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from bench.curves import Curve, Panel, plot_curves
from bench.numbers import milliseconds, percent, seconds
from bench.planning.limits import Limit
from bench.planning.plan import Plan, ProfilePlan
from bench.planning.trial import Trial


def dollars(value: float | None) -> str:
    """An amount of US dollars, or a dash."""
    return "-" if value is None else f"${value:,.2f}" if value >= 1 else f"${value:.3g}"


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def as_json(plan: Plan) -> dict[str, Any]:
    """For scripts: the fields of the plan, and for each trial its cost."""
    return {
        "target": plan.target,
        "workload": plan.workload,
        "asked_rate": plan.asked_rate,
        "best": plan.best,
        "profiles": [
            {
                "profile": each.profile,
                "price": each.price,
                "workers": each.workers,
                "dollars_an_hour": each.dollars_an_hour,
                "limit": each.limit,
                "why": each.why,
                "capacity": each.capacity,
                "floor": each.floor,
                "trials": [
                    {
                        "trial": trial,
                        "met": trial.met(plan.target),
                        "worker_hours_per_million_tokens": trial.worker_hours_per_million(),
                        "dollars_per_million_tokens": trial.dollars_per_million(each.price),
                    }
                    for trial in each.trials
                ],
            }
            for each in plan.profiles
        ],
    }


def print_plan(console: Console, plan: Plan) -> None:
    """Each profile's trials, the recommendation, and what binds where there is none."""
    for each in plan.profiles:
        if each.trials:
            console.print(_table(plan, each))
        console.print(_said(plan, each), markup=False)
    if len(plan.profiles) > 1 and plan.best is not None:
        console.print(f"best: {plan.best}", markup=False)


def _table(plan: Plan, each: ProfilePlan) -> Table:
    cost = "$ / M tokens" if each.price is not None else "worker-h / M tokens"
    figures = ("workers", "TTFT p95", "2nd half", "TPOT p95", "hit rate", "in flight", "failed", cost)
    title = f"{each.profile}: {plan.workload} at {_rate(plan, each.trials)} requests/s, {plan.target}"
    table = Table(*(Column(name, justify="right") for name in figures), "", title=title, title_justify="left")
    for trial in each.trials:
        money = trial.dollars_per_million(each.price)
        table.add_row(
            str(trial.workers),
            seconds(trial.ttft_p95),
            seconds(trial.late_ttft_p95),
            milliseconds(trial.tpot_p95),
            percent(trial.hit_rate),
            f"{trial.in_flight:.1f}",
            f"{trial.failed:,}",
            dollars(money) if each.price is not None else _hours(trial.worker_hours_per_million()),
            "met" if trial.met(plan.target) else "missed",
            style="bold green" if trial.workers == each.workers else "",
        )
    return table


def _rate(plan: Plan, trials: Sequence[Trial]) -> str:
    drawn = f"{trials[0].rate:.3g}"
    asked = drawn if plan.asked_rate is None else f"{plan.asked_rate:.3g}"
    return drawn if asked == drawn else f"{asked} (drawn: {drawn})"


def _said(plan: Plan, each: ProfilePlan) -> str:
    """The recommendation in sentences."""
    refused = each.floor.refused if each.floor is not None and each.limit is not Limit.CONTEXT else 0
    note = f" {refused:,} requests are longer than the context; they are refused, and not counted." if refused else ""
    chosen = each.chosen
    if chosen is None:
        return f"{each.profile}: the target cannot be met. {each.why[:1].upper()}{each.why[1:]}.{note}"
    several = "worker meets" if chosen.workers == 1 else "workers meet"
    said = f"{each.profile}: {chosen.workers} {several} {plan.target}"
    if each.price is not None:
        said += f", for {dollars(each.dollars_an_hour)} an hour or {dollars(chosen.dollars_per_million(each.price))}"
        said += " a million tokens"
    said += "."
    bears = each.capacity
    if bears is not None:
        said += (
            f" Each bears {bears.rate_met:.3g} requests/s of this workload"
            + (f", and no longer {bears.rate_missed:.3g}" if bears.rate_missed is not None else " at least")
            + f": scale up by then, at {bears.in_flight:.1f} requests in flight on a worker."
        )
    return said + note


def plot_plan(file: Path, plan: Plan) -> None:
    """Draw times and cost against workers, a line for each profile. Raises `ModuleNotFoundError` without matplotlib."""
    tried = [each for each in plan.profiles if each.trials]
    priced = all(each.price is not None for each in tried)

    def curves(read: Any) -> list[Curve]:
        return [
            Curve(each.profile, [(float(trial.workers), read(each, trial)) for trial in each.trials]) for each in tried
        ]

    panels = [
        Panel("Time to first token, p95", curves(lambda _, trial: trial.ttft_p95), seconds, bound=plan.target.ttft_p95),
        Panel(
            "Time per output token, p95",
            curves(lambda _, trial: trial.tpot_p95),
            milliseconds,
            bound=plan.target.tpot_p95,
        ),
        Panel(
            "US dollars for a million tokens" if priced else "Worker-hours for a million tokens",
            curves(
                lambda each, trial: (
                    trial.dollars_per_million(each.price) if priced else trial.worker_hours_per_million()
                )
            ),
            dollars if priced else _hours,
        ),
        Panel("Prompt tokens found in cache", curves(lambda _, trial: trial.hit_rate), percent),
    ]
    chosen = next((each.workers for each in tried if each.profile == plan.best), None)
    title = f"{plan.workload}: {plan.target}"
    plot_curves(file, panels, title, "workers", chosen=float(chosen) if chosen is not None else None)
