"""What the routers report about each worker, whether it is a pod of the KVCluster or somebody else's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from controller.api.model import EngineType
from controller.objects.names import Component
from controller.status import raw
from kvcluster.explain.gather import Gathered, RouterAnswer


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """What the routers report about a worker. None where no router could."""

    blocks: int | None
    capacity: int | None
    in_flight: int
    """Requests in progress, of all routers that were asked."""
    reuse_score: float
    """Blocks reused there lately, over the routers that were asked."""
    view_age_seconds: float | None
    """The oldest view of a router."""
    routable: bool
    matched: bool
    """Whether every router matches prompts against its cache."""
    history: bool
    """Whether a router matches them against what it has sent there, because the worker serves no cache feed."""
    why_not: str
    """Why it is not routable or not matched."""


@dataclass(frozen=True, slots=True)
class ForeignWorkerRow:
    """A worker of the routers that is no pod of this KVCluster: somebody else's engine, or another KVCluster's."""

    name: str
    """Of its pod, where the routers know it; else its worker id."""
    url: str
    figures: WorkerFigures


def figures_of_pod(pod: raw.Raw, routers: Sequence[RouterAnswer]) -> WorkerFigures | None:
    """What the routers report about the worker in this pod; None without any."""
    return _figures_of([(router, row) for router in routers for row in router.workers or () if _is_about(row, pod)])


def foreign_workers(gathered: Gathered) -> Iterator[ForeignWorkerRow]:
    """By name, with their data-parallel ranks added up as those of a pod are. A pod of ours that has just gone is none
    of them."""
    cluster = gathered.cluster
    external = raw.text(cluster, "spec", "engine", "type") == EngineType.EXTERNAL
    ours = None if external else f"{raw.name(cluster)}-{Component.WORKER}-"
    found: dict[str, list[tuple[RouterAnswer, raw.Raw]]] = {}
    for router in gathered.routers:
        for row in router.workers or ():
            is_gone = ours is not None and raw.text(row, "worker_id").startswith(ours)
            if not is_gone and not any(_is_about(row, pod) for pod in gathered.pods):
                found.setdefault(raw.text(row, "url").partition("#")[0], []).append((router, row))
    rows = [
        ForeignWorkerRow(raw.text(known[0][1], "pod") or raw.text(known[0][1], "worker_id"), url, figures)
        for url, known in found.items()
        if (figures := _figures_of(known)) is not None
    ]
    yield from sorted(rows, key=lambda row: (row.name, row.url))


def _figures_of(known: Sequence[tuple[RouterAnswer, raw.Raw]]) -> WorkerFigures | None:
    """The figures of one worker from the rows about it; None without any."""
    if not known:
        return None
    rows = [row for _, row in known]
    ages = [row["view_age"] for row in rows if isinstance(row.get("view_age"), int | float)]
    why = next((text for row in rows for text in _reasons(row) if text), "")
    return WorkerFigures(
        blocks=_sum_of_ranks(rows, "blocks"),
        capacity=_sum_of_ranks(rows, "capacity"),
        in_flight=sum(raw.number(row, "in_flight") for row in rows),
        reuse_score=sum(
            router.report.reuse_score.get(raw.text(row, "worker_id"), 0.0)
            for router, row in known
            if router.report is not None
        ),
        view_age_seconds=max(ages, default=None),
        routable=all(row.get("ready") is True for row in rows),
        matched=all(row.get("matching") is True for row in rows),
        history=any(row.get("history") is True for row in rows),
        why_not=why,
    )


def _is_about(row: raw.Raw, pod: raw.Raw) -> bool:
    """A worker's id is the name of its pod, for a data-parallel rank with `/` and its number. A worker that has not yet
    told its id is recognised by its address."""
    address = raw.text(pod, "status", "podIP")
    return raw.text(row, "worker_id").partition("/")[0] == raw.name(pod) or (
        bool(address) and urlsplit(raw.text(row, "url")).hostname == address.lower()
    )


def _reasons(row: raw.Raw) -> tuple[str, str]:
    return raw.text(row, "why_not_ready"), raw.text(row, "why_not_matching")


def _sum_of_ranks(rows: Iterable[raw.Raw], field: str) -> int | None:
    """The sum over a pod's data-parallel ranks of the largest figure that a router has of each; None without any."""
    largest: dict[str, int] = {}
    for row in rows:
        if type(value := row.get(field)) is int:
            url = raw.text(row, "url")
            largest[url] = max(largest.get(url, 0), value)
    return sum(largest.values()) if largest else None
