"""What the fake API server offers beside an API: controllers, faults on order, a log, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from tests.kube.apiserver import FakeApiServer
from tests.kube.apiserver.app import listen, serve
from tests.kube.binaries import helm_binaries
from tests.kube.calls import apply, ok, patch, refused, watching
from tests.kube.kubectl import Tool, parameters
from tests.kube.samples import GROUP, WIDGETS, config_map, deployment, pod, widget, widget_definition
from tests.processes import eventually

pytestmark = pytest.mark.process

MAPS = "/api/v1/namespaces/default/configmaps"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PATH = f"{WIDGETS}/namespaces/default/widgets"


@pytest.fixture
async def client(fake: FakeApiServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fake.url, trust_env=False, verify=False) as client:  # noqa: S501
        yield client


def there(fake: FakeApiServer, name: str) -> bool:
    return fake.store.get(("", "configmaps"), ("default", name)) is not None


def marked(fake: FakeApiServer, name: str) -> bool:
    stored = fake.store.get(("", "configmaps"), ("default", name))
    return stored is not None and "deletionTimestamp" in stored.obj["metadata"]


async def own(client: httpx.AsyncClient, name: str, *owners: str, block: bool = False) -> dict[str, Any]:
    """Create a ConfigMap that belongs to others."""
    references = []
    for owner in owners:
        uid = ok(await client.get(f"{MAPS}/{owner}"))["metadata"]["uid"]
        references.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "name": owner, "uid": uid, "blockOwnerDeletion": block}
        )
    return ok(await client.post(MAPS, json=config_map(name, ownerReferences=references)), 201)


# The garbage collector


async def test_what_belongs_to_a_deleted_object_goes_with_it(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    await own(client, "owner")
    await own(client, "second")
    await own(client, "child", "owner")
    await own(client, "grandchild", "child")
    await own(client, "shared", "owner", "second")
    ok(await client.delete(f"{MAPS}/owner"))
    await eventually(lambda: not there(fake, "grandchild"))
    assert not there(fake, "child")
    assert [r["name"] for r in ok(await client.get(f"{MAPS}/shared"))["metadata"]["ownerReferences"]] == ["second"]


async def test_orphans_stay(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    await own(client, "owner")
    await own(client, "child", "owner")
    ok(await client.request("DELETE", f"{MAPS}/owner", json={"propagationPolicy": "Orphan"}))
    await eventually(lambda: not there(fake, "owner"))
    assert "ownerReferences" not in ok(await client.get(f"{MAPS}/child"))["metadata"]


async def test_in_the_foreground_the_owner_goes_last(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    await own(client, "owner")
    await own(client, "child", "owner", block=True)
    ok(await patch(client, f"{MAPS}/child", {"metadata": {"finalizers": ["example.dev/hold"]}}))
    ok(await client.request("DELETE", f"{MAPS}/owner", json={"propagationPolicy": "Foreground"}))
    await eventually(lambda: marked(fake, "child"))
    assert there(fake, "owner")
    ok(await patch(client, f"{MAPS}/child", {"metadata": {"finalizers": None}}))
    await eventually(lambda: not there(fake, "owner"))


async def test_an_owner_that_never_was_is_a_dead_one(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "00000000-0000-0000-0000-000000000000"}
    ok(await client.post(MAPS, json=config_map("child", ownerReferences=[reference])), 201)
    await eventually(lambda: not there(fake, "child"))


async def test_a_namespace_takes_everything_in_it_along(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    ok(await client.post("/api/v1/namespaces", json={"metadata": {"name": "shop"}}), 201)
    held = config_map("held", finalizers=["example.dev/hold"])
    maps = "/api/v1/namespaces/shop/configmaps"
    for body in (held, config_map("free")):
        ok(await client.post(maps, json=body), 201)
    ok(await client.delete("/api/v1/namespaces/shop"))
    await eventually(lambda: fake.store.get(("", "configmaps"), ("shop", "free")) is None)
    status = refused(await client.post(maps, json=config_map("late")), 403, "Forbidden")
    assert "because it is being terminated" in status["message"]
    ok(await patch(client, f"{maps}/held", {"metadata": {"finalizers": None}}))
    await eventually(lambda: fake.store.get(("", "namespaces"), ("", "shop")) is None)


async def test_a_definition_takes_its_objects_along(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    ok(await client.post(DEFINITIONS, json=widget_definition()), 201)
    ok(await client.post(PATH, json=widget()), 201)
    ok(await client.delete(f"{DEFINITIONS}/widgets.{GROUP}"))
    await eventually(lambda: fake.store.get((GROUP, "widgets"), ("default", "a")) is None)
    await eventually(lambda: not list(fake.store.all(("apiextensions.k8s.io", "customresourcedefinitions"))))
    assert (await client.get(PATH)).status_code == 404


async def test_a_changed_schema_shows_in_objects_already_stored(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    definition = widget_definition()
    ok(await client.post(DEFINITIONS, json=definition), 201)
    before = ok(await client.post(PATH, json=widget()), 201)
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    spec["colour"] = {"type": "string", "default": "red"}
    ok(await apply(client, f"{DEFINITIONS}/widgets.{GROUP}", definition, force=True))
    after = ok(await client.get(f"{PATH}/a"))
    assert after["spec"]["colour"] == "red"
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


# Faults


async def test_requests_fail_on_order(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    fake.faults.fail(verb="create", resource="configmaps", status=429, times=2, retry_after=1)
    for _ in range(2):
        answer = await client.post(MAPS, json=config_map())
        assert refused(answer, 429, "TooManyRequests")["details"]["retryAfterSeconds"] == 1
        assert answer.headers["retry-after"] == "1"
    ok(await client.post(MAPS, json=config_map()), 201)
    fault = fake.faults.fail(verb="patch", resource="configmaps", name="c", status=409)
    refused(await patch(client, f"{MAPS}/c", {"data": {"a": "1"}}), 409, "Conflict")
    assert fault.hits == 1
    fake.faults.clear()
    ok(await patch(client, f"{MAPS}/c", {"data": {"a": "1"}}))


async def test_a_quota_can_refuse_pods(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    message = 'pods "p" is forbidden: exceeded quota: small, requested: pods=1, used: pods=2, limited: pods=2'
    fake.faults.fail(verb="create", resource="pods", namespace="default", status=403, message=message)
    status = refused(await client.post("/api/v1/namespaces/default/pods", json=pod()), 403, "Forbidden")
    assert status["message"] == message


async def test_chance_fails_the_same_requests_each_run(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    async def run() -> list[int]:
        fake.faults.clear()
        fake.faults.seed(7)
        fake.faults.fail(verb="list", status=500, probability=0.5)
        return [(await client.get(MAPS)).status_code for _ in range(12)]

    first = await run()
    assert set(first) == {200, 500}
    assert await run() == first


async def test_a_delayed_request_waits(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    fake.faults.delay(3600, verb="get", resource="configmaps")
    waiting = asyncio.create_task(client.get(f"{MAPS}/c"))
    ok(await client.post(MAPS, json=config_map()), 201)
    assert not waiting.done()
    waiting.cancel()


async def test_watches_are_cut_as_by_a_broken_network(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    ok(await client.post(MAPS, json=config_map()), 201)
    async with watching(client, MAPS) as events:
        await events.next()
        assert fake.faults.cut_watches() == 1
        with pytest.raises(httpx.RemoteProtocolError):
            await events.next()
    assert fake.faults.cut_watches() == 0


async def test_connections_can_be_refused(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    fake.faults.refuse(True)
    with pytest.raises(httpx.TransportError):
        await client.get(MAPS)
    fake.faults.refuse(False)
    ok(await client.get(MAPS))


# The server itself


async def test_a_restart_keeps_objects_address_and_history(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    created = ok(await client.post(MAPS, json=config_map()), 201)
    url = fake.url
    async with watching(client, MAPS) as events:
        await events.next()
        await fake.stop()
        with pytest.raises(httpx.TransportError):
            await events.next()
    with pytest.raises(httpx.TransportError):
        await client.get(MAPS)
    await fake.start()
    assert fake.url == url
    assert ok(await client.get(f"{MAPS}/c")) == created
    async with watching(client, MAPS, resourceVersion=created["metadata"]["resourceVersion"]) as events:
        ok(await client.delete(f"{MAPS}/c"))
        assert await events.next_names(1) == [("DELETED", "c")]


async def test_the_log_tells_who_asked_for_what(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    fake.requests.clear()
    await client.get(f"{MAPS}/c")
    await client.post(f"{MAPS}", json=config_map())
    await patch(client, "/apis/apps/v1/namespaces/default/deployments/web/scale", {})
    user = "system:serviceaccount:default:robot"
    await client.get("/api/v1/pods", headers={"Authorization": f"Bearer {fake.token(user)}"})
    async with watching(client, MAPS) as events:
        await events.next()
    assert [tuple(entry) for entry in fake.requests] == [
        ("get", "", "configmaps", "", "default", "c", "admin", 404),
        ("create", "", "configmaps", "", "default", "", "admin", 201),
        ("patch", "apps", "deployments", "scale", "default", "web", "admin", 404),
        ("list", "", "pods", "", "", "", user, 403),
        ("watch", "", "configmaps", "", "default", "", "admin", 200),
    ]


async def test_a_pods_port_is_reached_through_its_proxy(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    async def status(request: Request) -> JSONResponse:
        return JSONResponse({"path": request.url.path, "query": dict(request.query_params)})

    state = ServerState()
    sock = listen("127.0.0.1", 0)
    server = await serve(Starlette(routes=[Route("/status", status)]), sock, state)
    port = sock.getsockname()[1]
    try:
        body = pod(nodeName="n1")
        body["spec"]["containers"][0]["ports"] = [{"name": "management", "containerPort": port}]
        ok(await client.post("/api/v1/namespaces/default/pods", json=body), 201)
        proxy = f"/api/v1/namespaces/default/pods/p:{port}/proxy/status"
        refused(await client.get(proxy), 400, "BadRequest")
        ok(await patch(client, "/api/v1/namespaces/default/pods/p/status", {"status": {"podIP": "127.0.0.1"}}))
        assert ok(await client.get(proxy, params={"a": "b"})) == {"path": "/status", "query": {"a": "b"}}
        ok(await client.get("/api/v1/namespaces/default/pods/p:management/proxy/status"))
        missing = await client.get(f"/api/v1/namespaces/default/pods/none:{port}/proxy/status")
        refused(missing, 404, "NotFound")
    finally:
        server.close()
    refused(await client.get("/api/v1/namespaces/default/pods/p:1/proxy/status"), 503, "ServiceUnavailable")


@pytest.mark.parametrize("value", [True, -1, "x", [], {}, None, [None], {"a": None}, [[]]])
async def test_whatever_a_field_holds_the_server_judges_it(client: httpx.AsyncClient, value: Any) -> None:
    """Every field of a Deployment in turn is replaced by something odd: accepted or refused, never a crash."""
    path = "/apis/apps/v1/namespaces/default/deployments"
    fields = [
        ("spec",), ("spec", "replicas"), ("spec", "selector"), ("spec", "template"), ("spec", "template", "spec"),
        ("spec", "template", "spec", "containers"), ("metadata", "labels"), ("metadata", "ownerReferences"),
    ]  # fmt: skip
    for field in fields:
        body = deployment()
        at = body
        for name in field[:-1]:
            at = at[name]
        at[field[-1]] = value
        answer = await client.post(path, json=body, params={"dryRun": "All"})
        assert answer.status_code in (201, 400, 422), answer.text


@pytest.mark.parametrize("binary", parameters(helm_binaries()))
async def test_helm_installs_upgrades_and_removes(binary: Path, fake: FakeApiServer, tmp_path: Path) -> None:
    chart = tmp_path / "demo"
    (chart / "templates").mkdir(parents=True)
    (chart / "crds").mkdir()
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: demo\nversion: 0.1.0\n")
    (chart / "values.yaml").write_text("replicas: 1\n")
    (chart / "crds" / "widgets.yaml").write_text(yaml.safe_dump(widget_definition()))
    web = yaml.safe_dump(deployment(replicas=1)).replace("replicas: 1", "replicas: {{ .Values.replicas }}")
    (chart / "templates" / "web.yaml").write_text(web)
    helm = Tool(binary, fake.kubeconfig(tmp_path / "kubeconfig"), tmp_path)
    await helm("install", "demo", str(chart), "-n", "shop", "--create-namespace")
    await helm("upgrade", "demo", str(chart), "-n", "shop", "--set", "replicas=3")
    web_key = (("apps", "deployments"), ("shop", "web"))
    stored = fake.store.get(*web_key)
    assert stored is not None
    assert stored.obj["spec"]["replicas"] == 3
    assert fake.store.get(("apiextensions.k8s.io", "customresourcedefinitions"), ("", f"widgets.{GROUP}"))
    await helm("uninstall", "demo", "-n", "shop")
    assert fake.store.get(*web_key) is None
