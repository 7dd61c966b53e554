"""kopf and the official asyncio client against the fake API server: what the operator is made of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import kopf
import pytest
from kopf._cogs.structs.credentials import ConnectionInfo
from kubernetes.aio import client as kubernetes
from kubernetes.aio import config as kubernetes_config

from tests.kube.apiserver import FakeApiServer
from tests.kube.calls import ok, patch
from tests.kube.samples import GROUP, WIDGETS, deployment, widget, widget_definition
from tests.processes import eventually

pytestmark = pytest.mark.process

PATH = f"{WIDGETS}/namespaces/default/widgets"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"


class Operator:
    """A small operator: notes what its handlers were told."""

    def __init__(self, url: str, token: str) -> None:
        self.handled: list[tuple[str, str, int]] = []
        self.seen: list[tuple[str, str]] = []
        self.indexed: set[str] = set()
        self.deployments: set[str] = set()
        self.registry = kopf.OperatorRegistry()
        registry = self.registry

        @kopf.on.login(registry=registry)
        def login(**_: Any) -> ConnectionInfo:
            return ConnectionInfo(server=url, token=token)

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
            registry=self.registry, namespaces=["default"], standalone=True, stop_flag=stop, ready_flag=ready
        )
        thread = asyncio.create_task(asyncio.to_thread(asyncio.run, operator))
        try:
            await eventually(ready.is_set)
            yield
        finally:
            stop.set()
            async with asyncio.timeout(30):
                await thread


@pytest.fixture
async def client(fake: FakeApiServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fake.url, trust_env=False, verify=False) as client:  # noqa: S501
        ok(await client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json=widget_definition()), 201)
        yield client


async def test_kopf_handles_the_life_of_an_object(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    operator = Operator(fake.url, fake.token("admin"))
    ok(await client.post(PATH, json=widget("old")), 201)
    async with operator.running():
        await eventually(lambda: ("create", "old", 1) in operator.handled)
        ok(await client.post(PATH, json=widget("a")), 201)
        await eventually(lambda: ("create", "a", 1) in operator.handled)
        assert operator.indexed == {"gpt2"}
        ok(await patch(client, f"{PATH}/a", {"spec": {"mode": "slow"}}))
        await eventually(lambda: ("update", "a", 2) in operator.handled)
        labelled = deployment()
        labelled["metadata"]["labels"] = {"app": "web"}
        ok(await client.post(DEPLOYMENTS, json=labelled), 201)
        ok(await client.post(DEPLOYMENTS, json=deployment("other")), 201)
        await eventually(lambda: operator.seen)
        assert operator.deployments == {"web"}
        fake.faults.cut_watches()
        ok(await client.delete(f"{DEPLOYMENTS}/web"))
        await eventually(lambda: ("DELETED", "web") in operator.seen)
        assert {name for _, name in operator.seen} == {"web"}
        fake.compact()
        fake.faults.cut_watches()
        ok(await client.delete(f"{PATH}/a"))
        await eventually(lambda: ("delete", "a", 0) in operator.handled)
        await eventually(lambda: fake.store.get((GROUP, "widgets"), ("default", "a")) is None)
        obj = ok(await client.get(f"{PATH}/old"))
        assert obj["status"] == {"ready": 1}
        assert obj["metadata"]["finalizers"] == ["example.dev/operator"]
        events = f"/api/v1/namespaces/default/events?fieldSelector=involvedObject.uid={obj['metadata']['uid']}"
        await eventually(lambda: any(e.resource == "events" and e.verb == "create" for e in fake.requests))
        assert "Reconciled" in {e["reason"] for e in ok(await client.get(events))["items"]}
    again = Operator(fake.url, fake.token("admin"))
    async with again.running():
        await eventually(lambda: again.handled)
    assert again.handled == [("resume", "old", 1)]


async def test_the_official_client_applies(fake: FakeApiServer, client: httpx.AsyncClient, tmp_path: Path) -> None:
    configuration = kubernetes.Configuration()
    kubeconfig = str(fake.kubeconfig(tmp_path / "kubeconfig"))
    await kubernetes_config.load_kube_config(kubeconfig, client_configuration=configuration)
    async with kubernetes.ApiClient(configuration) as api:
        apps = kubernetes.AppsV1Api(api)
        headers = {"field_manager": "me", "force": True, "_content_type": "application/apply-patch+yaml"}
        body = deployment(replicas=2)
        applied = await apps.patch_namespaced_deployment("web", "default", body, **headers)
        assert applied.spec.replicas == 2
        body["spec"].pop("replicas")
        applied = await apps.patch_namespaced_deployment("web", "default", body, **headers)
        assert applied.spec.replicas == 1
        listed = await apps.list_namespaced_deployment("default", label_selector="")
        assert [item.metadata.name for item in listed.items] == ["web"]
        custom = kubernetes.CustomObjectsApi(api)
        obj = await custom.create_namespaced_custom_object(GROUP, "v1alpha1", "default", "widgets", widget())
        assert obj["spec"]["mode"] == "fast"
