"""A local cluster at one moment: its processes, the router's view of the workers, and hit rates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from controller.local.cluster import LocalCluster, by_address
from controller.local.process import ProcessState, ProcessStatus

QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
OBSERVE_TIMEOUT = 0.5
"""Seconds: a frozen process must not hold up the view of the others."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker at one moment. None where it is not known."""

    process: ProcessStatus
    routable: bool | None = None
    """Whether the router may choose it."""
    note: str = ""
    """Why not, why the process is not ready, or which adapter is not loaded."""
    blocks: int | None = None
    """Cached blocks, as the router sees them."""
    capacity: int | None = None
    running: int | None = None
    waiting: int | None = None
    hit_rate: float | None = None
    """Cached prompt tokens / all prompt tokens since the process started."""


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A cluster at one moment."""

    name: str
    strategy: str
    router: ProcessStatus
    workers: tuple[WorkerView, ...]


def hit_rate(metrics: str) -> float | None:
    """Hit rate from a worker's metrics; None before its first request."""
    # The parser gets only the lines it needs: a worker has hundreds, and all are read once a second.
    lines = "\n".join(line for line in metrics.splitlines() if line.startswith((QUERIES, HITS)))
    counts = dict.fromkeys((QUERIES, HITS), 0.0)
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            counts[sample.name] += sample.value
    return counts[HITS] / counts[QUERIES] if counts[QUERIES] else None


def worker_view(process: ProcessStatus, rows: Sequence[Mapping[str, Any]], metrics: str | None) -> WorkerView:
    """A worker from its process, the rows of its data-parallel ranks in the router's `/workers`, and its metrics."""
    if not rows:
        return WorkerView(process, note=process.detail, hit_rate=hit_rate(metrics or ""))
    loads = [row.get("load") or {} for row in rows]
    capacities = [row.get("capacity") or load.get("total_blocks") for row, load in zip(rows, loads, strict=True)]
    return WorkerView(
        process=process,
        routable=all(row["ready"] for row in rows),
        note=process.detail or next((why for row in rows if (why := _note(row))), ""),
        blocks=_total(row.get("blocks") for row in rows),
        capacity=_total(capacities),
        running=_total(load.get("running") for load in loads),
        waiting=_total(load.get("waiting") for load in loads),
        hit_rate=hit_rate(metrics or ""),
    )


def _note(row: Mapping[str, Any]) -> str:
    """Why the worker gets no requests, or which adapter it has not loaded."""
    missing = row.get("missing_adapters") or {}
    return str(row.get("why_not_ready") or "") or next(
        (f"adapter {name} is not loaded: {why or 'it is being loaded'}" for name, why in missing.items()), ""
    )


def _total(values: Iterable[int | None]) -> int | None:
    """None if none is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


async def observe(cluster: LocalCluster, client: httpx.AsyncClient) -> ClusterView:
    """Asks the router and every worker that runs, all at the same time."""
    listing, *metrics = await asyncio.gather(
        _get(client, f"{cluster.management_url}/workers", cluster.router, cluster.management_headers),
        *(_get(client, f"{worker.url}/metrics", worker) for worker in cluster.workers),
    )
    rows: Sequence[Mapping[str, Any]] = [] if listing is None else listing.json()["workers"]
    known = by_address(rows)
    return ClusterView(
        name=cluster.manifest.name,
        strategy=cluster.manifest.spec.router.strategy.value,
        router=cluster.router,
        workers=tuple(
            worker_view(worker, known.get(worker.url, ()), None if answer is None else answer.text)
            for worker, answer in zip(cluster.workers, metrics, strict=True)
        ),
    )


async def _get(
    client: httpx.AsyncClient, url: str, process: ProcessStatus, headers: Mapping[str, str] | None = None
) -> httpx.Response | None:
    # The socket of a process that does not run accepts connections as well, and would keep us waiting.
    if process.state not in (ProcessState.READY, ProcessState.STOPPING):
        return None
    try:
        answer = await client.get(url, headers=headers, timeout=OBSERVE_TIMEOUT)
    except httpx.HTTPError:
        return None
    return answer if answer.is_success else None
