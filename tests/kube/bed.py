"""A fake API server with a fake node, and what tests ask of the two."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.kube.apiserver import FakeApiServer
from tests.kube.kubelet import FakeNode, Timing
from tests.kube.kubelet.api import DEPLOYMENTS, PODS, SERVICES, Api, Kind

NAMESPACE = "default"
FAST = Timing(scale=0.02)
SURGE = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}

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


class Bed:
    """A test's API server and node, and what it asks of them. Everything is called `app`."""

    def __init__(self, server: FakeApiServer, node: FakeNode, api: Api, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.node = node
        self.api = api
        self.session = session

    async def deploy(self, *containers: dict[str, Any], replicas: int = 2, pod: Any = None, **spec: Any) -> None:
        pod = {"enableServiceLinks": False, "containers": list(containers), **(pod or {})}
        template = {"metadata": {"labels": {"app": "app"}}, "spec": pod}
        spec = {"selector": {"matchLabels": {"app": "app"}}, "template": template, "strategy": SURGE, **spec}
        spec |= {"replicas": replicas}
        self.api.create(DEPLOYMENTS, {"metadata": {"namespace": NAMESPACE, "name": "app"}, "spec": spec})

    async def serve(self, **spec: Any) -> str:
        """Creates the Service; its URL."""
        ports = [{"name": "http", "port": 8000, "targetPort": "http", "protocol": "TCP"}]
        item = {"metadata": {"namespace": NAMESPACE, "name": "app"}}
        self.api.create(SERVICES, {**item, "spec": {"selector": {"app": "app"}, "ports": ports, **spec}})
        return f"http://{self.node.cluster_ip(NAMESPACE, 'app')}:8000"

    async def change(self, **spec: Any) -> None:
        self.api.patch(DEPLOYMENTS, (NAMESPACE, "app"), {"spec": spec})

    async def get(self, url: str) -> str:
        async with self.session.get(url, headers={"connection": "close"}) as answer:
            return await answer.text()

    def pod(self, name: str) -> Any:
        return self.api.get(PODS, (NAMESPACE, name))

    async def all(self, kind: Kind) -> list[Any]:
        return [each for each in self.api.all(kind) if each["metadata"]["namespace"] == NAMESPACE]

    async def until(self, kind: Kind, condition: Callable[[list[Any]], Any]) -> list[Any]:
        """The objects, once the condition holds for them."""
        async with asyncio.timeout(60):
            while not condition(items := await self.all(kind)):  # noqa: ASYNC110  a client without a watch
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
async def bed(logs: Path, timing: Timing = FAST) -> AsyncIterator[Bed]:
    server = FakeApiServer()
    await server.start()
    try:
        async with (
            aiohttp.ClientSession() as session,
            FakeNode(server, logs=logs, timing=timing) as node,
        ):
            yield Bed(server, node, Api(server.cluster), session)
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


async def answers(it: Bed, url: str) -> str:
    """The answer of a Service, once it has pods to give one."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectorError):
                return await it.get(url)
            await asyncio.sleep(0.02)
