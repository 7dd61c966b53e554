"""kopf and the official asyncio client against API servers, fake and (where there is one) real.

Not covered: the operator that is made of them (tests/kube/operator).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import kopf
import pytest
from kopf._cogs.structs.credentials import ConnectionInfo
from kubernetes.aio import client as kubernetes
from kubernetes.aio import config as kubernetes_config

from tests.kube.backends import Backend
from tests.kube.calls import ok, patch
from tests.kube.samples import GROUP, deployment, widget
from tests.processes import eventually

pytestmark = pytest.mark.process


class Operator:
    """A small operator: notes what its handlers were told."""

    def __init__(self, server: Backend, namespace: str) -> None:
        self._namespace = namespace
        self.handled: list[tuple[str, str, int]] = []
        self.seen: list[tuple[str, str]] = []
        self.indexed: set[str] = set()
        self.deployments: set[str] = set()
        self.registry = kopf.OperatorRegistry()
        registry = self.registry

        @kopf.on.login(registry=registry)
        def login(**_: Any) -> ConnectionInfo:
            return ConnectionInfo(server=server.url, token=server.token, insecure=server.real)

        @kopf.on.startup(registry=registry)
        def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
            settings.persistence.finalizer = "example.dev/operator"
            settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="example.dev")
            settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix="example.dev")
            settings.posting.enabled = True
            settings.watching.server_timeout = 60
            settings.watching.label_selectors["apps", "deployments"] = "app=web"
            settings.networking.error_backoffs = [0.05, 0.1, 0.2]
            settings.watching.reconnect_backoff = 0.05

        @kopf.index(GROUP, "v1alpha1", "widgets", id="models", registry=registry)
        def models(name: str, spec: kopf.Spec, **_: Any) -> dict[str, str]:
            return {str(spec["model"]): name}

        @kopf.on.create(GROUP, "v1alpha1", "widgets", registry=registry)
        @kopf.on.resume(GROUP, "v1alpha1", "widgets", registry=registry)
        @kopf.on.update(GROUP, "v1alpha1", "widgets", registry=registry)
        async def reconcile(
            name: str, reason: str, meta: kopf.Meta, patch: kopf.Patch, models: Any, body: kopf.Body, **_: Any
        ) -> None:
            self.handled.append((str(reason), name, int(meta["generation"])))
            self.indexed = set(models)
            patch.status["ready"] = 1
            kopf.info(body, reason="Reconciled", message=f"as of generation {meta['generation']}")

        @kopf.on.delete(GROUP, "v1alpha1", "widgets", registry=registry)
        async def forget(name: str, **_: Any) -> None:
            self.handled.append(("delete", name, 0))

        @kopf.index("apps", "v1", "deployments", id="replicas", registry=registry)
        def replicas(name: str, spec: kopf.Spec, **_: Any) -> dict[str, int]:
            return {name: spec["replicas"]}

        @kopf.on.event("apps", "v1", "deployments", registry=registry)
        async def notice(type: str | None, name: str, replicas: Any, **_: Any) -> None:  # noqa: A002  kopf's name
            self.seen.append((str(type), name))
            self.deployments = set(replicas)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The operator on a loop of its own: when it stops, it cancels every task of its loop, whoever made it."""
        stop, ready = threading.Event(), threading.Event()
        operator = kopf.operator(
            registry=self.registry, namespaces=[self._namespace], standalone=True, stop_flag=stop, ready_flag=ready
        )
        thread = asyncio.create_task(asyncio.to_thread(asyncio.run, operator))
        try:
            await eventually(ready.is_set)
            yield
        finally:
            stop.set()
            async with asyncio.timeout(30):
                await thread


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110  nothing tells when
            await asyncio.sleep(0.05)


async def test_kopf_handles_the_life_of_an_object(
    api: Backend, client: httpx.AsyncClient, widgets: str, ns: str
) -> None:
    operator = Operator(api, ns)
    deployments = f"/apis/apps/v1/namespaces/{ns}/deployments"
    ok(await client.post(widgets, json=widget("old")), 201)
    async with operator.running():
        await eventually(lambda: ("create", "old", 1) in operator.handled)
        ok(await client.post(widgets, json=widget("a")), 201)
        await eventually(lambda: ("create", "a", 1) in operator.handled)
        assert operator.indexed == {"gpt2"}
        ok(await patch(client, f"{widgets}/a", {"spec": {"mode": "slow"}}))
        await eventually(lambda: ("update", "a", 2) in operator.handled)
        labelled = deployment()
        labelled["metadata"]["labels"] = {"app": "web"}
        ok(await client.post(deployments, json=labelled), 201)
        ok(await client.post(deployments, json=deployment("other")), 201)
        await eventually(lambda: operator.seen)
        assert operator.deployments == {"web"}
        if not api.real:
            api.fake.faults.cut_watches()
        ok(await client.delete(f"{deployments}/web"))
        await eventually(lambda: ("DELETED", "web") in operator.seen)
        assert {name for _, name in operator.seen} == {"web"}
        if not api.real:
            api.fake.compact()
            api.fake.faults.cut_watches()
        ok(await client.delete(f"{widgets}/a"))
        await eventually(lambda: ("delete", "a", 0) in operator.handled)

        async def gone() -> bool:
            return (await client.get(f"{widgets}/a")).status_code == 404

        await until(gone)
        obj = ok(await client.get(f"{widgets}/old"))
        assert obj["status"] == {"ready": 1}
        assert obj["metadata"]["finalizers"] == ["example.dev/operator"]
        events = f"/api/v1/namespaces/{ns}/events?fieldSelector=involvedObject.uid={obj['metadata']['uid']}"

        async def told() -> bool:
            return "Reconciled" in {event["reason"] for event in ok(await client.get(events))["items"]}

        await until(told)
    again = Operator(api, ns)
    async with again.running():
        await eventually(lambda: again.handled)
    assert again.handled == [("resume", "old", 1)]


async def test_the_official_client_applies(api: Backend, widgets: str, ns: str, tmp_path: Path) -> None:
    configuration = kubernetes.Configuration()
    await kubernetes_config.load_kube_config(
        str(api.kubeconfig(tmp_path / "kubeconfig")), client_configuration=configuration
    )
    async with kubernetes.ApiClient(configuration) as client:
        apps = kubernetes.AppsV1Api(client)
        headers = {"field_manager": "me", "force": True, "_content_type": "application/apply-patch+yaml"}
        body = deployment(replicas=2)
        applied = await apps.patch_namespaced_deployment("web", ns, body, **headers)
        assert applied.spec.replicas == 2
        body["spec"].pop("replicas")
        applied = await apps.patch_namespaced_deployment("web", ns, body, **headers)
        assert applied.spec.replicas == 1
        listed = await apps.list_namespaced_deployment(ns, label_selector="")
        assert [item.metadata.name for item in listed.items] == ["web"]
        custom = kubernetes.CustomObjectsApi(client)
        obj = await custom.create_namespaced_custom_object(GROUP, "v1alpha1", ns, "widgets", widget())
        assert obj["spec"]["mode"] == "fast"
