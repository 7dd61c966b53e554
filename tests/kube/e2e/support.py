"""A whole cluster on one machine, and traffic through it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from bench.loadgen import LoadOptions, drive
from bench.record import Record
from bench.workloads import WorkloadSpec, build_workload
from router.live.document import Live, decode
from runtime.http.tokens import decoded, token_headers
from tests.kube.kubelet import FakeNode
from tests.kube.operator.support import NAMESPACE, Cluster, Controller, Object
from tests.processes import eventually

SPEED = 4.0
RATE = 4.0
"""Emulated requests a second: 16 on the wall clock."""
START = 120.0


def _silent(sent: int, answered: int, failed: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, slots=True)
class World:
    """The API server's side, the node's side, and the operator between them."""

    api: Cluster
    node: FakeNode
    controller: Controller

    async def serve(self, name: str = "rag", workers: int = 2, routers: int = 1, **spec: Any) -> None:
        """Applies a KVCluster and waits until it is Ready."""
        spec = {
            "engine": {"speed": SPEED},
            "workers": {"replicas": workers, "drainSeconds": 20},
            "router": {"replicas": routers},
            **spec,
        }
        await self.api.create(name, **spec)
        await self.ready(name)

    async def ready(self, name: str = "rag") -> None:
        async def is_ready() -> bool:
            return await self.api.condition(name, "Ready", "Serving")

        await eventually(is_ready, f"{name} is Ready", START)
        await eventually(lambda: self.answers(name), "the Service's proxy knows it", 30)

    async def answers(self, name: str = "rag") -> bool:
        async with httpx.AsyncClient(trust_env=False) as client:
            try:
                return (await client.get(f"{self.url(name)}/v1/models")).is_success
            except httpx.ConnectError:
                return False

    async def scale(self, workers: int, name: str = "rag") -> None:
        """`kubectl scale kvc`, and its effect."""
        await self.api.scale("kvclusters", name, workers)

        async def followed() -> bool:
            return bool((await self.api.get("deployments", f"{name}-worker"))["spec"]["replicas"] == workers)

        await eventually(followed, "the Deployment follows", 30)
        await self.rolled_out("worker", name)

    async def rolled_out(self, component: str, name: str = "rag") -> None:
        """All pods of a Deployment are of its latest template, and no older one is left."""

        async def done() -> bool:
            deployment = await self.api.get("deployments", f"{name}-{component}")
            status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
            return bool(
                status.get("observedGeneration") == deployment["metadata"]["generation"]
                and status.get("updatedReplicas", 0) == status.get("availableReplicas", 0) == wanted
                and len(await self.pods(component, name)) == wanted
            )

        await eventually(done, f"{name}-{component} is rolled out", 90)

    async def pods(self, component: str, name: str = "rag") -> list[Object]:
        labels = {"app.kubernetes.io/instance": name, "app.kubernetes.io/component": component}
        return [
            pod for pod in await self.api.list("pods") if labels.items() <= pod["metadata"].get("labels", {}).items()
        ]

    def url(self, name: str = "rag") -> str:
        """What a client in the cluster would ask."""
        return f"http://{self.node.cluster_ip(NAMESPACE, f'{name}-router')}:8000"

    async def live(self, pod: str) -> Live:
        """The live document that the page of this router pod shows."""
        (found,) = [each for each in await self.pods("router") if each["metadata"]["name"] == pod]
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"http://{found['status']['podIP']}:9000/live"
            return decode((await client.get(url, headers=await self.management_headers())).content)

    async def management_headers(self, name: str = "rag") -> dict[str, str]:
        """What lets a program in at the routers' management ports."""
        secret = await self.api.get("secrets", f"{name}-router-management")
        return token_headers(decoded(secret["data"])[0])

    async def restart(self, component: str, name: str = "rag") -> None:
        """`kubectl rollout restart`."""
        note = {"kubectl.kubernetes.io/restartedAt": f"{asyncio.get_running_loop().time()}"}
        patch = {"spec": {"template": {"metadata": {"annotations": note}}}}
        await self.api.patch("deployments", f"{name}-{component}", patch)

    async def under_load(self, *disturbances: Callable[[], Awaitable[None]], name: str = "rag") -> list[Record]:
        """Requests flow from before the first disturbance until after the last; what became of each."""
        records: list[Record] = []
        done = asyncio.Event()

        async def traffic() -> None:
            for seed in itertools.count():
                # Short portions, so that it ends soon after the last disturbance does.
                workload = build_workload(WorkloadSpec("rag", seed=seed, limit=48, rate=RATE))
                driven = await drive(self.url(name), workload, LoadOptions(speed=SPEED, timeout=60), _silent)
                assert len(driven.records) == workload.count
                records.extend(driven.records)
                if done.is_set():
                    return

        flowing = asyncio.create_task(traffic())
        try:
            for disturb in disturbances:
                await disturb()
        finally:
            done.set()
        await flowing
        return records


def failures(records: list[Record]) -> list[str]:
    """What went wrong, of the requests that failed."""
    return [record.error for record in records if record.error is not None]
