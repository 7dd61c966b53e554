"""The fake node against the fake API server: Deployments become processes that answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.kube.apiserver import FakeApiServer
from tests.kube.kubelet import FakeNode, Timing
from tests.kube.kubelet.client import CONFIG_MAPS, DEPLOYMENTS, ENDPOINT_SLICES, PODS, SERVICES, Api, Resource
from tests.processes import eventually, runs

pytestmark = pytest.mark.process

NAMESPACE = "default"
COST = "controller.kubernetes.io/pod-deletion-cost"
FAST = Timing(scale=0.02)

STANDIN = """
import http.server, os, signal, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", str(len(pod)))
        self.end_headers()
        self.wfile.write(pod.encode())
    do_POST = do_GET

if os.environ.get("DEAF"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pod = os.environ.get("WHO_AM_I") or os.environ["POD"]
print("listening on", os.environ["IP"], flush=True)
http.server.ThreadingHTTPServer((os.environ["IP"], 8080), Handler).serve_forever()
"""
"""Answers with the name of its pod."""


def standin(**container: Any) -> dict[str, Any]:
    """A container whose process starts in no time."""
    own = [
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    return {
        "name": "main",
        "image": "standin:1",
        "command": ["python", "-c", STANDIN],
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1},
        **container,
        "env": [*own, *container.get("env", ())],
    }


def exiting(code: str, **container: Any) -> dict[str, Any]:
    """A container that runs this Python code."""
    return {"name": "main", "image": "standin:1", "command": ["python", "-c", code], **container}


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


class Bed:
    """A test's API server and node, and what it asks of them. Everything is called `app`."""

    def __init__(self, server: FakeApiServer, node: FakeNode, api: Api, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.node = node
        self.api = api
        self.session = session

    async def deploy(self, *containers: dict[str, Any], replicas: int = 2, pod: Any = None, **spec: Any) -> None:
        template = {"metadata": {"labels": {"app": "app"}}, "spec": {"containers": list(containers), **(pod or {})}}
        spec = {"replicas": replicas, "selector": {"matchLabels": {"app": "app"}}, "template": template, **spec}
        await self.api.create(DEPLOYMENTS, {"metadata": {"namespace": NAMESPACE, "name": "app"}, "spec": spec})

    async def serve(self, **spec: Any) -> str:
        """Creates the Service; its URL."""
        ports = [{"name": "http", "port": 8000, "targetPort": "http", "protocol": "TCP"}]
        item = {"metadata": {"namespace": NAMESPACE, "name": "app"}}
        await self.api.create(SERVICES, {**item, "spec": {"selector": {"app": "app"}, "ports": ports, **spec}})
        return f"http://{self.node.cluster_ip(NAMESPACE, 'app')}:8000"

    async def change(self, **spec: Any) -> None:
        await self.api.patch(DEPLOYMENTS, (NAMESPACE, "app"), {"spec": spec})

    async def get(self, url: str) -> str:
        async with self.session.get(url, headers={"connection": "close"}) as answer:
            return await answer.text()

    async def all(self, resource: Resource) -> list[Any]:
        items: list[Any] = (await self.api.list(resource))["items"]
        return [each for each in items if each["metadata"]["namespace"] == NAMESPACE]

    async def until(self, resource: Resource, condition: Callable[[list[Any]], Any]) -> list[Any]:
        """The objects, once the condition holds for them."""
        async with asyncio.timeout(60):
            while not condition(items := await self.all(resource)):  # noqa: ASYNC110  a client without a watch
                await asyncio.sleep(0.02)
        return items

    async def rolled_out(self) -> Any:
        """The Deployment, once all of its pods are of its newest template and available."""

        def done(items: list[Any]) -> bool:
            (item,) = [each for each in items if each["metadata"]["name"] == "app"]
            status, wanted = item.get("status", {}), item["spec"]["replicas"]
            counts = [status.get(field, 0) for field in ("replicas", "updatedReplicas", "availableReplicas")]
            return counts == [wanted] * 3 and status["observedGeneration"] == item["metadata"]["generation"]

        return next(each for each in await self.until(DEPLOYMENTS, done) if each["metadata"]["name"] == "app")


@contextlib.asynccontextmanager
async def bed(logs: Path, timing: Timing = FAST, **options: Any) -> AsyncIterator[Bed]:
    server = FakeApiServer()
    await server.start()
    try:
        async with (
            aiohttp.ClientSession() as session,
            FakeNode(server.url, logs=logs, timing=timing, **options) as node,
        ):
            yield Bed(server, node, Api(server.url, session), session)
    finally:
        await server.stop()


def waiting(pod: Any) -> str:
    """Why the pod's container does not run."""
    statuses = pod.get("status", {}).get("containerStatuses") or [{"state": {}}]
    return str(statuses[0]["state"].get("waiting", {}).get("reason", ""))


def reasons(deployment: Any) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in deployment["status"]["conditions"]}


def endpoints(slices: list[Any]) -> dict[str, dict[str, bool]]:
    """Conditions by name of the pod."""
    listed = [each for item in slices for each in item.get("endpoints") or ()]
    return {each["targetRef"]["name"]: each["conditions"] for each in listed}


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
        pids = [pod.pid for pod in pods]
    assert not any(runs(pid) for pid in pids)


async def answers(it: Bed, url: str) -> str:
    """The answer of a Service, once it has pods to give one."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectorError):
                return await it.get(url)
            await asyncio.sleep(0.02)


async def test_a_rolling_update_loses_no_request(tmp_path):
    async with bed(tmp_path, Timing(scale=0.02, pre_stop=0.2)) as it:
        draining = standin(lifecycle={"preStop": {"sleep": {"seconds": 5}}})
        await it.deploy(draining, strategy={"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}})
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
        await it.deploy(standin(lifecycle={"preStop": {"sleep": {"seconds": 600}}}), replicas=3)
        await it.serve()
        await it.rolled_out()
        cheap = it.node.pods()[1]
        await it.api.patch(PODS, (NAMESPACE, cheap.name), {"metadata": {"annotations": {COST: "-7"}}})
        await it.change(replicas=2)
        slices = await it.until(ENDPOINT_SLICES, lambda items: any(e["terminating"] for e in endpoints(items).values()))
        assert endpoints(slices)[cheap.name] == {"ready": False, "serving": True, "terminating": True}
        assert await it.get(f"http://{cheap.ip}:8080") == cheap.name
        # Told a second time to end, and at once.
        await it.api.delete(PODS, (NAMESPACE, cheap.name), gracePeriodSeconds=0)
        await eventually(lambda: len(it.node.pods()) == 2)
        assert not runs(cheap.pid)
        await it.until(ENDPOINT_SLICES, lambda items: len(endpoints(items)) == 2)


async def test_a_killed_process_starts_again_in_place(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(standin(), replicas=1)
        await it.rolled_out()
        (before,) = it.node.pods()
        it.node.kill(before.name, signal.SIGKILL)
        (item,) = await it.until(PODS, lambda items: items[0]["status"]["containerStatuses"][0]["restartCount"] == 1)
        assert item["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 137
        await it.rolled_out()
        (after,) = it.node.pods()
        assert (after.name, after.ip, after.restarts) == (before.name, before.ip, 1)
        assert after.pid != before.pid


async def test_a_container_that_ends_again_and_again_is_backed_off(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(exiting("import sys; print('no luck'); sys.exit(3)"), replicas=1)
        (item,) = await it.until(PODS, lambda items: [waiting(each) for each in items] == ["CrashLoopBackOff"])
        (status,) = item["status"]["containerStatuses"]
        assert status["lastState"]["terminated"]["exitCode"] == 3
        assert "restarting failed container=main" in status["state"]["waiting"]["message"]
        assert item["status"]["phase"] == "Running"
        assert "no luck" in it.node.pods()[0].log.read_text()


async def test_an_image_that_cannot_be_pulled(tmp_path):
    async with bed(tmp_path) as it:
        it.node.refuse_image("standin:1")
        await it.deploy(standin(), replicas=1)
        (item,) = await it.until(PODS, lambda items: [waiting(each) for each in items] == ["ImagePullBackOff"])
        assert item["status"]["phase"] == "Pending"
        assert "standin:1: not found" in item["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
        assert it.node.pods()[0].pid is None
        it.node.allow_image("standin:1")
        await it.rolled_out()


async def test_a_quota_that_refuses_pods(tmp_path):
    async with bed(tmp_path) as it:
        it.node.quota(NAMESPACE, pods=1)
        await it.deploy(standin())

        def failed(items: list[Any]) -> bool:
            return any("ReplicaFailure" in reasons(each) for each in items if "conditions" in each.get("status", {}))

        (deployment,) = await it.until(DEPLOYMENTS, failed)
        assert reasons(deployment)["ReplicaFailure"] == ("True", "FailedCreate")
        message = deployment["status"]["conditions"][-1]["message"]
        assert "is forbidden: exceeded quota: pods, requested: pods=1, used: pods=1, limited: pods=1" in message
        it.node.quota(NAMESPACE, pods=None)
        assert "ReplicaFailure" not in reasons(await it.rolled_out())


async def test_a_container_waits_for_its_configuration(tmp_path):
    async with bed(tmp_path) as it:
        source = [{"configMapRef": {"name": "app"}}]
        await it.deploy(standin(envFrom=source, env=[{"name": "WHO_AM_I", "value": "$(WHO)-$(NOT)"}]), replicas=1)
        (item,) = await it.until(PODS, lambda items: [waiting(e) for e in items] == ["CreateContainerConfigError"])
        message = item["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
        assert message == 'configmap "app" not found'
        named = {"metadata": {"namespace": NAMESPACE, "name": "app"}, "data": {"WHO": "me"}}
        await it.api.create(CONFIG_MAPS, named)
        await it.rolled_out()
        assert await it.get(f"http://{it.node.pods()[0].ip}:8080") == "me-$(NOT)"


async def test_a_deaf_process_is_killed_after_its_grace_period(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(
            standin(
                env=[{"name": "DEAF", "value": "1"}],
                lifecycle={"preStop": {"exec": {"command": ["python", "-c", "print('farewell')"]}}},
            ),
            replicas=1,
            pod={"terminationGracePeriodSeconds": 1},
        )
        await it.rolled_out()
        (pod,) = it.node.pods()
        await it.change(replicas=0)
        await eventually(lambda: not it.node.pods())
        assert not runs(pod.pid)
        assert "farewell" in pod.log.read_text()
        await it.until(PODS, lambda items: not items)


async def test_probes_that_can_end_a_container_do(tmp_path):
    async with bed(tmp_path, Timing(scale=0.02, deadly=0.02)) as it:
        dead = {"httpGet": {"path": "/", "port": 1}, "periodSeconds": 1, "failureThreshold": 2}
        await it.deploy(standin(livenessProbe=dead), standin(name="late", env=[], startupProbe=dead), replicas=1)

        def restarted(items: list[Any]) -> bool:
            statuses = [each for item in items for each in item["status"].get("containerStatuses", ())]
            return len(statuses) == 2 and all(each["restartCount"] for each in statuses)

        await it.until(PODS, restarted)


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


async def test_an_api_server_that_is_away_for_a_while(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(standin(), replicas=1)
        await it.rolled_out()
        (before,) = it.node.pods()
        await it.server.stop()
        it.node.kill(before.name)
        await eventually(lambda: [pod.restarts for pod in it.node.pods()] == [1])
        await it.server.start()
        await it.until(PODS, lambda items: items[0]["status"]["containerStatuses"][0]["restartCount"] == 1)
        await it.change(replicas=2)
        await it.rolled_out()
        assert before.name in [pod.name for pod in it.node.pods()]


NODE = f"""
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.kube.test_kubelet import bed, standin
from tests.processes import eventually

async def main():
    async with bed(Path(sys.argv[1])) as it:
        await it.deploy(standin(), standin(name="module", command=["python", "-m", "http.server", "0"]), replicas=1)
        await eventually(lambda: it.node.pods() and len(it.node.pods()[0].pids) == 2)
        print(json.dumps(list(it.node.pods()[0].pids.values())), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_processes_die_with_a_killed_test(tmp_path):
    test = await asyncio.create_subprocess_exec(sys.executable, "-c", NODE, str(tmp_path), stdout=PIPE)
    assert test.stdout is not None
    pids = json.loads(await test.stdout.readline())
    assert all(runs(pid) for pid in pids)
    os.kill(test.pid, signal.SIGKILL)
    await test.wait()
    await eventually(lambda: not any(runs(pid) for pid in pids))
