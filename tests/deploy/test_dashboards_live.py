"""Every query of every panel returns data from a real Prometheus that scrapes a real controller, router and workers.

The targets carry the labels that Kubernetes' service discovery would give them, and go through the rules of
docs/dashboards.md.

Not covered: whether the figures are right (tests/e2e/test_figures.py), and Grafana.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from controller.api.load import validate_manifest
from controller.api.model import KVCluster
from controller.local.cluster import LocalCluster
from controller.local.desired_processes import Addresses, DesiredProcess, desired_processes
from controller.objects.names import Component
from deploy.monitoring.dashboards import DASHBOARDS, DOCUMENT
from tests.deploy import prometheus
from tests.deploy.controller import running_controller
from tests.deploy.test_dashboards import metric_names
from tests.kube.operator.support import OPERATOR, prepared
from tests.processes import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        prometheus.binary() is None, reason="Prometheus is not installed (Debian: apt-get install prometheus)"
    ),
]

NAMESPACE, NAME = "serving", "rag"
WINDOW = 30.0
"""Seconds over which a panel must show something."""
DOCUMENTS = [" ".join(f"fact{document}x{word}" for word in range(150)) for document in range(6)]


def workers_file(folder: Path) -> Any:
    """Local mode's processes, but the router reads its workers from a file: a source with an age, as in a cluster."""

    def plan(manifest: KVCluster, addresses: Addresses) -> tuple[DesiredProcess, ...]:
        file = folder / "workers"
        file.write_text("\n".join(addresses.workers))

        def args(process: DesiredProcess) -> tuple[str, ...]:
            return tuple(f"--workers-file={file}" if arg.startswith("--workers=") else arg for arg in process.args)

        return tuple(
            dataclasses.replace(process, args=args(process)) if process.role is Component.ROUTER else process
            for process in desired_processes(manifest, addresses)
        )

    return plan


@asynccontextmanager
async def traffic(url: str) -> AsyncIterator[None]:
    """Questions over documents, streamed, and now and then one that is refused."""
    numbers = count()

    async def client(http: httpx.AsyncClient) -> None:
        for number in numbers:
            prompt = f"{DOCUMENTS[number % len(DOCUMENTS)]} Question {number}:"
            body = {"prompt": prompt, "max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
            (await http.post(f"{url}/v1/completions", json=body)).raise_for_status()
            if number % 10 == 0:
                assert (await http.post(f"{url}/v1/completions", content=b"{")).status_code == 400

    async with httpx.AsyncClient(timeout=30, trust_env=False) as http, asyncio.TaskGroup() as group:
        clients = [group.create_task(client(http)) for _ in range(6)]
        try:
            yield
        finally:
            for task in clients:
                task.cancel()


@asynccontextmanager
async def controller(folder: Path) -> AsyncIterator[str]:
    """Address of the metrics of a controller that looks after one KVCluster, which someone keeps changing."""

    async def change() -> None:
        for number in count():
            await cluster.patch("kvclusters", NAME, {"spec": {"workers": {"replicas": 1 + number % 2}}})
            await asyncio.sleep(0.5)

    async with prepared() as cluster:
        await cluster.create(NAME)
        kubeconfig = cluster.server.kubeconfig(folder / "kubeconfig", OPERATOR)
        settings = {"CONTROLLER_IMAGE": "kvcluster:test"}
        async with (
            running_controller(kubeconfig, folder / "controller.log", settings) as process,
            asyncio.TaskGroup() as group,
        ):
            changing = group.create_task(change())
            try:
                yield process.metrics
            finally:
                changing.cancel()


PORTS = {"router": "management", "worker": "http", "controller": "metrics"}
"""Names of the ports with metrics."""


def target(address: str, pod: str, component: str, instance: str, namespace: str) -> dict[str, Any]:
    """A target as Kubernetes' service discovery finds a pod of ours."""
    label = "__meta_kubernetes_pod_label_app_kubernetes_io_"
    return {
        "targets": [address],
        "labels": {
            "__meta_kubernetes_namespace": namespace,
            "__meta_kubernetes_pod_name": pod,
            f"{label}name": "kvcluster",
            f"{label}component": component,
            f"{label}instance": instance,
            "__meta_kubernetes_pod_annotation_prometheus_io_scrape": "true",
            "__meta_kubernetes_pod_container_port_name": PORTS[component],
        },
    }


def documented_job() -> dict[str, Any]:
    found = re.search(r"<!-- scrape: .*?```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    [job] = yaml.safe_load(found[1])["scrape_configs"]
    return dict(job)


def scrape_config(cluster: LocalCluster, controller: str) -> dict[str, Any]:
    job = documented_job()
    del job["kubernetes_sd_configs"]
    pods = [(urlsplit(worker.url).netloc, worker.name, "worker") for worker in cluster.workers]
    pods.append((urlsplit(cluster.management_url).netloc, f"{NAME}-router-0", "router"))
    job["static_configs"] = [target(*pod, NAME, NAMESPACE) for pod in pods]
    job["static_configs"].append(target(controller, "controller-0", "controller", "release", "kvcluster-system"))
    return {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]}


def substituted(expression: str) -> str:
    """A query as Grafana sends it, for one namespace and one KVCluster."""
    values = {"__rate_interval": "5s", "namespace": NAMESPACE, "kvcluster": NAME, "worker": ".*", "model": ".*"}
    for variable, value in values.items():
        expression = expression.replace(f"${variable}", value)
    assert "$" not in expression, expression
    return expression


async def test_every_panel_shows_data(tmp_path: Path) -> None:
    queries = [found for board in DASHBOARDS.values() for found in board.expressions]
    manifest = validate_manifest(
        {
            "apiVersion": "kvcluster.dev/v1alpha1",
            "kind": "KVCluster",
            "metadata": {"name": NAME},
            "spec": {"engine": {"speed": 5}, "workers": {"replicas": 3}},
        }
    )
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(LocalCluster(manifest, desired=workers_file(tmp_path)))
        await cluster.wait_ready()
        config = scrape_config(cluster, await stack.enter_async_context(controller(tmp_path)))
        server = await stack.enter_async_context(prometheus.running(config, tmp_path))
        await stack.enter_async_context(traffic(cluster.url))
        empty = {(panel.title, substituted(query.expression)) for panel, query in queries if not panel.quiet}

        async def all_show_data() -> bool:
            for panel, expression in sorted(empty):
                if await server.points(expression, WINDOW):
                    empty.discard((panel, expression))
            return not empty

        with suppress(AssertionError):
            await eventually(all_show_data, "every panel shows data", 90)
        assert not empty, "\n".join(f"{panel}: {expression}" for panel, expression in sorted(empty))

        # A query that ends in `or vector(0)` always returns something: what it asks for must exist as well.
        asked = set().union(*(metric_names(query.expression) for panel, query in queries if not panel.quiet))
        described = await server.families()
        # OpenMetrics describes a counter without its suffix.
        asked = {name for name in asked if not name.startswith("kvcluster_agent_")}
        assert not {name for name in asked if not {name, name.removesuffix("_total")} & described}

        for variable in (variable for board in DASHBOARDS.values() for variable in board.variables):
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable.query)
            assert found is not None
            values = await server.label_values(substituted(found[1]), found[2])
            expected = {"namespace": {NAMESPACE}, "kvcluster": {NAME}, "model": {"meta-llama/Llama-2-13b-hf"}}
            assert values == expected.get(variable.name, {worker.name for worker in cluster.workers})
        memory = "process_resident_memory_bytes"
        assert await server.label_values(memory, "component") == {"controller", "router", "worker"}
        assert await server.label_values("kvcluster_router_workers", "pod") == {f"{NAME}-router-0"}
