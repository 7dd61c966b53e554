"""The fake node against the fake API server: Deployments become processes that answer, and end in order.

Not covered: what fails (test_kubelet_failures.py), what a process finds around it (test_pod_surroundings.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json

import aiohttp
import pytest

from tests.kube.bed import NAMESPACE, answers, bed, endpoints, reasons, standin
from tests.kube.kubelet import Timing
from tests.kube.kubelet.api import ENDPOINT_SLICES, PODS
from tests.processes import eventually, runs

pytestmark = pytest.mark.process

COST = "controller.kubernetes.io/pod-deletion-cost"

WORKER = {
    "name": "worker",
    "image": "kvcluster:1",
    "command": ["python", "-m", "worker.main"],
    "args": ["--speed=100"],
    "env": [{"name": "WORKER_WORKER_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
    "ports": [{"name": "http", "containerPort": 8100}],
    "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1},
    "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10},
}


async def test_a_deployment_of_workers_becomes_ready_and_its_service_leads_to_them(tmp_path):
    async with bed(tmp_path, Timing()) as it:
        await it.deploy(WORKER)
        url = await it.serve()
        deployment = await it.rolled_out()
        assert deployment["status"]["readyReplicas"] == 2
        assert reasons(deployment) == {
            "Available": ("True", "MinimumReplicasAvailable"),
            "Progressing": ("True", "NewReplicaSetAvailable"),
        }
        pods = it.node.pods()
        assert len({pod.ip for pod in pods}) == 2
        (item,) = await it.until(ENDPOINT_SLICES, lambda items: sum(e["ready"] for e in endpoints(items).values()) == 2)
        assert item["ports"] == [{"name": "http", "port": 8100, "protocol": "TCP"}]
        assert {each["addresses"][0] for each in item["endpoints"]} == {pod.ip for pod in pods}
        assert item["metadata"]["ownerReferences"][0]["kind"] == "Service"
        await answers(it, f"{url}/health")
        await eventually(lambda: all("worker_started" in pod.log.read_text() for pod in pods))
        answered = {json.loads(await it.get(f"http://{pod.ip}:8100/cache/state"))["worker_id"] for pod in pods}
        assert answered == {pod.name for pod in pods}
        by_api = f"{it.server.url}/api/v1/namespaces/{NAMESPACE}/pods/{pods[0].name}:8100/proxy/cache/state"
        assert json.loads(await it.get(by_api))["worker_id"] == pods[0].name
        pids = [pod.pid for pod in pods]
    assert not any(runs(pid) for pid in pids)


async def test_a_rolling_update_loses_no_request(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(standin(lifecycle={"preStop": {"exec": {"command": ["sleep", "1"]}}}))
        url = await it.serve()
        await it.rolled_out()
        before = {pod.name for pod in it.node.pods()}
        assert await answers(it, url) in before
        answered = []

        async def ask() -> None:
            while True:
                # Not GET: aiohttp would send that again by itself.
                async with it.session.post(url, headers={"connection": "close"}) as answer:
                    answered.append(await answer.text())

        asking = asyncio.create_task(ask())
        await it.change(template={"metadata": {"annotations": {"restarted": "now"}}})
        await it.rolled_out()
        await eventually(lambda: len(it.node.pods()) == 2)
        await eventually(lambda: {*answered[-10:]} == {pod.name for pod in it.node.pods()})
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        assert not before & {pod.name for pod in it.node.pods()}
        sets = {pod["metadata"]["labels"]["pod-template-hash"] for pod in await it.all(PODS)}
        assert len(sets) == 1


async def test_the_cheapest_pod_ends_first_and_its_endpoint_says_so_while_it_serves(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(standin(lifecycle={"preStop": {"exec": {"command": ["sleep", "600"]}}}), replicas=3)
        await it.serve()
        await it.rolled_out()
        cheap = it.node.pods()[1]
        it.api.patch(PODS, (NAMESPACE, cheap.name), {"metadata": {"annotations": {COST: "-7"}}})
        await it.change(replicas=2)
        slices = await it.until(ENDPOINT_SLICES, lambda items: any(e["terminating"] for e in endpoints(items).values()))
        assert endpoints(slices)[cheap.name] == {"ready": False, "serving": True, "terminating": True}
        assert await it.get(f"http://{cheap.ip}:8080") == cheap.name
        # Told a second time to end, and at once.
        it.api.delete(PODS, it.pod(cheap.name), grace=0)
        await eventually(lambda: len(it.node.pods()) == 2)
        assert not runs(cheap.pid)
        await it.until(ENDPOINT_SLICES, lambda items: len(endpoints(items)) == 2)


async def test_a_hook_runs_before_the_process_is_told_to_end(tmp_path):
    async with bed(tmp_path) as it:
        hook = {"preStop": {"exec": {"command": ["sh", "-c", "sleep 0.1; echo farewell from $POD"]}}}
        await it.deploy(standin(lifecycle=hook), replicas=1)
        await it.rolled_out()
        (pod,) = it.node.pods()
        await it.change(replicas=0)
        await eventually(lambda: not it.node.pods())
        assert f"farewell from {pod.name}" in pod.log.read_text()


async def test_a_service_without_ready_pods_refuses_and_serves_again(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(standin(), replicas=1)
        url = await it.serve()
        assert await answers(it, url) == it.node.pods()[0].name
        await it.change(replicas=0)

        async def refused() -> bool:
            try:
                await it.get(url)
            except aiohttp.ClientConnectorError:
                return True
            except aiohttp.ClientError:
                pass  # the pod is gone and the proxy does not know it yet
            return False

        async with asyncio.timeout(30):
            while not await refused():  # noqa: ASYNC110  a socket is asked, which sets no event
                await asyncio.sleep(0.02)
        await it.change(replicas=1)
        assert await answers(it, url) == it.node.pods()[0].name
