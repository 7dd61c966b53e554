"""Which worker pod a scale-down should take: the one whose cache the routers make least use of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.objects.names import Component
from controller.status import raw
from controller.status.pods import active
from controller.status.raw import Raw
from controller.status.report import RouterReport

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
"""Read by the ReplicaSet controller: of otherwise equal pods, it deletes the one with the lowest cost first."""

STEP = 100
NEGLIGIBLE = 0.5
"""Blocks: a score decays for ever, and one below this counts as 0."""
MARGIN = 1.25
"""A pod overtakes another when its score is higher by this factor: two pods with similar scores keep their order."""


def deletion_costs(reports: Mapping[str, RouterReport], pods: Iterable[Raw]) -> dict[str, int]:
    """Cost by worker pod: 0 for those with a negligible score, the rest a multiple of 100 by rank of their score.

    The score is summed over the routers, and over the data-parallel ranks of a pod. The order that the pods'
    annotations have stands as long as no pod's score is clearly higher than the next one's, and costs that are in order
    already stay, so that little is patched. Empty when no router could be asked.
    """
    if not reports:
        return {}
    workers = active(pods, Component.WORKER)
    scores = {raw.name(pod): 0.0 for pod in workers}
    for report in reports.values():
        for worker_id, score in report.reuse_score.items():
            pod, _, _ = worker_id.partition("/")  # `pod/1` is a data-parallel rank
            if pod in scores:
                scores[pod] += score
    had = {raw.name(pod): deletion_cost(pod) or 0 for pod in workers}
    reused = [name for name in scores if scores[name] >= NEGLIGIBLE]
    order = _ordered(sorted(reused, key=lambda name: (had[name], scores[name], name)), scores)
    costs = [had[name] for name in order]
    if not all(low < high for low, high in zip([0, *costs], costs, strict=False)):
        costs = [STEP * rank for rank in range(1, len(order) + 1)]
    return {**dict.fromkeys(scores, 0), **dict(zip(order, costs, strict=True))}


def deletion_cost(pod: Raw) -> int | None:
    """The cost in the pod's annotation; None when there is none, or no number."""
    value = raw.text(pod, "metadata", "annotations", ANNOTATION)
    try:
        return int(value)
    except ValueError:
        return None


def _ordered(names: list[str], scores: Mapping[str, float]) -> list[str]:
    """Lowest score first: neighbours change places when the first has a clearly higher score, until none has."""
    order = list(names)
    moved = True
    while moved:
        moved = False
        for index in range(len(order) - 1):
            first, second = order[index : index + 2]
            if scores[first] > MARGIN * scores[second]:
                order[index : index + 2] = [second, first]
                moved = True
    return order
