"""The questions that end-to-end tests ask of a running cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from controller.local.cluster import LocalCluster
from kvcache.ranks import rank_id

StartCluster = Callable[..., AbstractAsyncContextManager["ClusterUnderTest"]]
"""The fixture `start_cluster`."""


class ClusterUnderTest:
    """A running cluster with the questions the tests ask of it."""

    def __init__(self, local: LocalCluster, client: httpx.AsyncClient) -> None:
        self.local = local
        self.client = client

    @property
    def url(self) -> str:
        return self.local.url

    async def router_workers(self) -> list[dict[str, Any]]:
        answer = await self.client.get(f"{self.local.management_url}/workers")
        workers: list[dict[str, Any]] = answer.json()["workers"]
        return workers

    async def router_view(self, worker_id: str) -> tuple[int, Counter[str]]:
        """Epoch and multiset of block keys, as the router believes them."""
        answer = await self.client.get(f"{self.local.management_url}/workers/{worker_id}/blocks")
        answer.raise_for_status()
        view = answer.json()
        return view["epoch"], Counter(view["keys"])

    async def worker_state(self, url: str, rank: int = 0) -> tuple[int, Counter[str]]:
        """Epoch and multiset of block keys, as the data-parallel rank of the worker states them."""
        state = (await self.client.get(f"{url}/cache/state", params={"rank": rank})).json()
        return state["epoch"], Counter(key for key, _ in state["blocks"])

    async def views_agree(self) -> bool:
        """Whether the router's view of every rank of every worker equals the rank's own state."""
        ranks = self.local.manifest.spec.engine.data_parallel.size
        for worker in self.local.workers:
            for rank in range(ranks):
                try:
                    view = await self.router_view(rank_id(worker.name, rank, ranks))
                    if view != await self.worker_state(worker.url, rank):
                        return False
                except (httpx.HTTPError, KeyError):
                    return False
        return True

    async def metric(self, url: str, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that carry these labels."""
        text = (await self.client.get(f"{url}/metrics")).text
        samples = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert samples, f"{url}/metrics has no {name} {labels}"
        return sum(samples)
