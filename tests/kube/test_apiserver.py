"""What the fake API server offers beside an API: garbage collection, faults on order, a log, restarts, refusals.

Not covered: the API itself (test_conformance*.py); helm and kubectl (tests/deploy, test_kubectl.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from tests.kube.apiserver import FakeApiServer
from tests.kube.apiserver.app import listen, serve
from tests.kube.calls import apply, ok, patch, refused, watching
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


async def test_an_owner_that_never_was_is_a_dead_one(fake: FakeApiServer, client: httpx.AsyncClient) -> None:
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "00000000-0000-0000-0000-000000000000"}
    ok(await client.post(MAPS, json=config_map("child", ownerReferences=[reference])), 201)
    await eventually(lambda: not there(fake, "child"))


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
    await patch(client, "/apis/apps/v1/namespaces/default/deployments/web/status", {})
    user = "system:serviceaccount:default:robot"
    await client.get("/api/v1/pods", headers={"Authorization": f"Bearer {fake.token(user)}"})
    async with watching(client, MAPS) as events:
        await events.next()
    assert [tuple(entry) for entry in fake.requests] == [
        ("get", "", "configmaps", "", "default", "c", "admin", 404),
        ("create", "", "configmaps", "", "default", "", "admin", 201),
        ("patch", "apps", "deployments", "status", "default", "web", "admin", 404),
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
        ok(await client.post("/api/v1/namespaces/default/pods", json=body), 201)
        proxy = f"/api/v1/namespaces/default/pods/p:{port}/proxy/status"
        refused(await client.get(proxy), 400, "BadRequest")
        ok(await patch(client, "/api/v1/namespaces/default/pods/p/status", {"status": {"podIP": "127.0.0.1"}}))
        assert ok(await client.get(proxy, params={"a": "b"})) == {"path": "/status", "query": {"a": "b"}}
        missing = await client.get(f"/api/v1/namespaces/default/pods/none:{port}/proxy/status")
        refused(missing, 404, "NotFound")
    finally:
        server.close()
    refused(await client.get("/api/v1/namespaces/default/pods/p:1/proxy/status"), 503, "ServiceUnavailable")


@pytest.mark.parametrize(
    "value", [pytest.param(each, id=repr(each)) for each in (True, -1, "x", [], {}, None, [None], {"a": None}, [[]])]
)
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


UNMODELLED = [
    pytest.param("GET", "/api/v1/nodes", {}, id="kind"),
    pytest.param("GET", "/apis/apps/v1/statefulsets", {}, id="kind of a group that is served"),
    pytest.param("GET", "/api/v1/namespaces/default/pods/p/log", {}, id="subresource"),
    pytest.param("DELETE", MAPS, {}, id="collection"),
    pytest.param("DELETE", "/api/v1/namespaces/default", {}, id="namespace"),
    pytest.param("DELETE", f"{MAPS}/c", {"json": {"propagationPolicy": "Foreground"}}, id="policy"),
    pytest.param("POST", MAPS, {"content": "a: b", "headers": {"content-type": "application/yaml"}}, id="YAML"),
    pytest.param("GET", MAPS, {"headers": {"accept": "application/json;as=PartialObjectMetadataList"}}, id="partial"),
    pytest.param("GET", f"{MAPS}?watch=1", {"headers": {"accept": "application/json;as=Table"}}, id="watched table"),
    pytest.param("GET", f"{MAPS}?resourceVersion=1&resourceVersionMatch=Exact", {}, id="exact version"),
    pytest.param("GET", f"{MAPS}?resourceVersion=99999999", {}, id="version from the future"),
    pytest.param("GET", f"{MAPS}?watch=1&sendInitialEvents=true", {}, id="initial events"),
]


@pytest.mark.parametrize(("method", "path", "options"), UNMODELLED)
async def test_what_is_not_modelled_is_refused_and_says_where_that_is_written(
    client: httpx.AsyncClient, method: str, path: str, options: dict[str, Any]
) -> None:
    ok(await client.post(MAPS, json=config_map()), 201)
    status = refused(await client.request(method, path, **options), 501, "NotImplemented")
    page = re.search(r"docs/decisions/[\w-]+\.md", status["message"])
    assert page is not None
    assert (Path(__file__).parents[2] / page[0]).is_file()


@pytest.mark.parametrize(
    "keyword",
    [
        pytest.param({"oneOf": [{"type": "string"}]}, id="oneOf"),
        pytest.param({"uniqueItems": False}, id="uniqueItems"),
        pytest.param({"format": "email"}, id="format"),
    ],
)  # fmt: skip
async def test_a_definition_that_says_more_than_is_modelled_is_refused(
    client: httpx.AsyncClient, keyword: dict[str, Any]
) -> None:
    definition = widget_definition()
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["mode"] |= (
        keyword
    )
    status = refused(await client.post(DEFINITIONS, json=definition), 422, "Invalid")
    assert "not modelled by the test bed" in status["message"]
