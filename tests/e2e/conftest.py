"""Clusters of real processes (a router and emulated workers) on loopback, started by local mode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from controller.api.load import validate_manifest
from controller.local.cluster import LocalCluster
from tests.e2e.support import ClusterUnderTest, StartCluster

START_SECONDS = 120.0


@pytest.fixture(scope="session")
def start_cluster() -> StartCluster:
    """`async with start_cluster(workers=2, speed=20) as cluster`."""

    @asynccontextmanager
    async def start(
        *, workers: int = 2, ranks: int = 1, speed: float = 20.0, blocks: int = 924, strategy: str = "cache_aware"
    ) -> AsyncIterator[ClusterUnderTest]:
        manifest = validate_manifest(
            {
                "apiVersion": "kvcluster.dev/v1alpha1",
                "kind": "KVCluster",
                "metadata": {"name": "e2e"},
                "spec": {
                    "model": {"profile": "llama-2-13b-a100-40gb"},
                    "engine": {"type": "emulator", "speed": speed, "dataParallel": {"size": ranks}},
                    "cache": {"blocks": blocks},
                    "workers": {"replicas": workers, "drainSeconds": 10},
                    "router": {"strategy": strategy},
                },
            }
        )
        async with LocalCluster(manifest) as local, httpx.AsyncClient(timeout=30, trust_env=False) as client:
            await local.wait_ready(START_SECONDS)
            yield ClusterUnderTest(local, client)

    return start
