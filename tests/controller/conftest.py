from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from controller.api.load import validate_manifest
from controller.api.model import KVCluster
from controller.local.cluster import LocalCluster, Options
from controller.local.desired_processes import Addresses, DesiredProcess, desired_processes

MakeManifest = Callable[..., KVCluster]


def build_manifest(**spec: Any) -> KVCluster:
    """A valid manifest named `demo` with these parts of the spec."""
    content = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "demo"}, "spec": spec}
    return validate_manifest(content)


@pytest.fixture
def make_manifest() -> MakeManifest:
    return build_manifest


def standins(**modes: str) -> Callable[[KVCluster, Addresses], tuple[DesiredProcess, ...]]:
    """The processes of a manifest, each replaced by a stand-in; `modes` sets STANDIN by name (with _ for -)."""

    def plan(manifest: KVCluster, addresses: Addresses) -> tuple[DesiredProcess, ...]:
        return tuple(
            dataclasses.replace(
                process,
                program="standin",
                env={
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])]),
                    "STANDIN": modes.get(process.name.replace("-", "_"), ""),
                },
            )
            for process in desired_processes(manifest, addresses)
        )

    return plan


@pytest.fixture
def local_cluster() -> Callable[..., Any]:
    @asynccontextmanager
    async def run(manifest: KVCluster, options: Options | None = None, **modes: str) -> AsyncIterator[LocalCluster]:
        async with LocalCluster(manifest, options, desired=standins(**modes)) as cluster:
            yield cluster

    return run
