"""Which worker pod a scale-down should take: the one whose cache the routers make least use of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.component import Component
from controller.status import raw
from controller.status.pods import active
from controller.status.raw import Raw
from controller.status.report import RouterReport

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
"""Read by the ReplicaSet controller: of pods that are otherwise alike the one with the lowest cost goes first."""

STEP = 100
COLD = 0.5
"""Blocks: heat decays for ever, and what is left of less than that is none."""
MARGIN = 1.25
"""A pod overtakes the one before it when it is warmer by this factor, so that two alike do not keep changing places."""


def deletion_costs(reports: Mapping[str, RouterReport | str], pods: Iterable[Raw]) -> dict[str, int]:
    """Cost by worker pod: 0 for those without heat, the rest a multiple of 100 by rank, the warmest highest.

    Heat is summed over the routers. The order that the pods' annotations have stands as long as no pod is clearly
    warmer than the next, and costs that are in order already stay, so that little is patched. Empty when no router
    could be asked.
    """
    answers = [report for report in reports.values() if isinstance(report, RouterReport)]
    if not answers:
        return {}
    workers = active(pods, Component.WORKER)
    heat = {raw.name(pod): sum(report.heat.get(raw.name(pod), 0.0) for report in answers) for pod in workers}
    had = {raw.name(pod): deletion_cost(pod) or 0 for pod in workers}
    warm = [name for name in heat if heat[name] >= COLD]
    order = _ordered(sorted(warm, key=lambda name: (had[name], heat[name], name)), heat)
    costs = [had[name] for name in order]
    if not all(low < high for low, high in zip([0, *costs], costs, strict=False)):
        costs = [STEP * rank for rank in range(1, len(order) + 1)]
    return {**dict.fromkeys(heat, 0), **dict(zip(order, costs, strict=True))}


def deletion_cost(pod: Raw) -> int | None:
    """The cost that the pod is annotated with; None without one that can be read."""
    value = raw.text(pod, "metadata", "annotations", ANNOTATION)
    try:
        return int(value)
    except ValueError:
        return None


def _ordered(names: list[str], heat: Mapping[str, float]) -> list[str]:
    """Coldest first: neighbours change places when the first is clearly warmer, until none is."""
    order = list(names)
    moved = True
    while moved:
        moved = False
        for index in range(len(order) - 1):
            first, second = order[index : index + 2]
            if heat[first] > MARGIN * heat[second]:
                order[index : index + 2] = [second, first]
                moved = True
    return order
