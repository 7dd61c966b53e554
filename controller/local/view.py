"""A local cluster at one moment: its processes, the router's view of the workers, and hit rates."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from controller.local.cluster import LocalCluster
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
    """Why not, or why the process is not ready."""
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


def worker_view(process: ProcessStatus, row: Mapping[str, Any] | None, metrics: str | None) -> WorkerView:
    """A worker from its process, its row in the router's `/workers`, and its metrics."""
    if row is None:
        return WorkerView(process, note=process.detail, hit_rate=hit_rate(metrics or ""))
    load = row.get("load") or {}
    return WorkerView(
        process=process,
        routable=bool(row["ready"]),
        note=process.detail or str(row.get("why_not_ready") or ""),
        blocks=row.get("blocks"),
        capacity=row.get("capacity") or load.get("total_blocks"),
        running=load.get("running"),
        waiting=load.get("waiting"),
        hit_rate=hit_rate(metrics or ""),
    )


async def observe(cluster: LocalCluster, client: httpx.AsyncClient) -> ClusterView:
    """Asks the router and every worker that runs, all at the same time."""
    listing, *metrics = await asyncio.gather(
        _get(client, f"{cluster.management_url}/workers", cluster.router),
        *(_get(client, f"{worker.url}/metrics", worker) for worker in cluster.workers),
    )
    rows: Sequence[Mapping[str, Any]] = [] if listing is None else listing.json()["workers"]
    by_url = {row["url"]: row for row in rows}
    return ClusterView(
        name=cluster.manifest.name,
        strategy=cluster.manifest.spec.router.strategy.value,
        router=cluster.router,
        workers=tuple(
            worker_view(worker, by_url.get(worker.url), None if answer is None else answer.text)
            for worker, answer in zip(cluster.workers, metrics, strict=True)
        ),
    )


async def _get(client: httpx.AsyncClient, url: str, process: ProcessStatus) -> httpx.Response | None:
    # The socket of a process that does not run accepts connections as well, and would keep us waiting.
    if process.state not in (ProcessState.READY, ProcessState.STOPPING):
        return None
    try:
        answer = await client.get(url, timeout=OBSERVE_TIMEOUT)
    except httpx.HTTPError:
        return None
    return answer if answer.is_success else None
