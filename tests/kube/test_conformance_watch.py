"""Lists and watches of the API server, fake and (where there is one) real: resuming, selection, bookmarks, pages.

Not covered: lists of exactly one version and watches as tables, which are not modelled; broken connections
(test_apiserver.py).
"""

from __future__ import annotations

import contextlib

import httpx
import pytest

from tests.kube.backends import Backend
from tests.kube.calls import MERGE, Object, apply, ok, patch, refused, watching
from tests.kube.samples import config_map, deployment, widget

pytestmark = pytest.mark.process


@pytest.fixture
def maps(ns: str) -> str:
    return f"/api/v1/namespaces/{ns}/configmaps"


async def test_a_watch_continues_a_list(client: httpx.AsyncClient, maps: str) -> None:
    listed = ok(await client.get(maps, params={"labelSelector": "t"}))
    assert listed["items"] == []
    version = listed["metadata"]["resourceVersion"]
    labels = {"t": "1"}
    ok(await client.post(maps, json=config_map("early", labels=labels)), 201)
    async with watching(client, maps, resourceVersion=version, labelSelector="t") as events:
        ok(await client.post(maps, json=config_map("late", labels=labels)), 201)
        ok(await patch(client, f"{maps}/late", {"data": {"a": "1"}}))
        ok(await client.delete(f"{maps}/early"))
        assert await events.next_names(4) == [
            ("ADDED", "early"), ("ADDED", "late"), ("MODIFIED", "late"), ("DELETED", "early"),
        ]  # fmt: skip


async def test_a_watch_is_resumed_after_the_last_event(client: httpx.AsyncClient, maps: str) -> None:
    version = ok(await client.get(maps))["metadata"]["resourceVersion"]
    for name in ("one", "two"):
        ok(await client.post(maps, json=config_map(name)), 201)
    async with watching(client, maps, resourceVersion=version) as events:
        _, first = await events.next()
    async with watching(client, maps, resourceVersion=first["metadata"]["resourceVersion"]) as events:
        assert await events.next_names(1) == [("ADDED", "two")]


async def test_a_deletion_is_a_version_of_its_own(client: httpx.AsyncClient, maps: str) -> None:
    created = ok(await client.post(maps, json=config_map("one")), 201)
    version = created["metadata"]["resourceVersion"]
    async with watching(client, maps, resourceVersion=version) as events:
        ok(await client.delete(f"{maps}/one"))
        kind, gone = await events.next()
    assert kind == "DELETED"
    assert int(gone["metadata"]["resourceVersion"]) > int(version)
    assert gone["metadata"]["uid"] == created["metadata"]["uid"]


async def test_a_watch_without_a_version_begins_with_what_there_is(client: httpx.AsyncClient, maps: str) -> None:
    ok(await client.post(maps, json=config_map("one", labels={"t": "1"})), 201)
    async with watching(client, maps, labelSelector="t") as events:
        assert await events.next_names(1) == [("ADDED", "one")]


async def test_objects_enter_and_leave_a_selection(client: httpx.AsyncClient, maps: str) -> None:
    version = ok(await client.get(maps))["metadata"]["resourceVersion"]
    ok(await client.post(maps, json=config_map("one", labels={"t": "no"})), 201)
    async with watching(client, maps, resourceVersion=version, labelSelector="t=yes") as events:
        ok(await patch(client, f"{maps}/one", {"metadata": {"labels": {"t": "yes"}}}))
        ok(await patch(client, f"{maps}/one", {"data": {"a": "1"}}))
        ok(await patch(client, f"{maps}/one", {"metadata": {"labels": {"t": "no"}}}))
        ok(await patch(client, f"{maps}/one", {"metadata": {"labels": {"t": "yes"}}}))
        found = await events.next_names(4)
    assert [kind for kind, _ in found] == ["ADDED", "MODIFIED", "DELETED", "ADDED"]


async def test_one_object_is_watched_by_its_name(client: httpx.AsyncClient, maps: str) -> None:
    version = ok(await client.get(maps))["metadata"]["resourceVersion"]
    for name in ("one", "two"):
        ok(await client.post(maps, json=config_map(name)), 201)
    async with watching(client, maps, resourceVersion=version, fieldSelector="metadata.name=two") as events:
        assert await events.next_names(1) == [("ADDED", "two")]


async def test_streaming_lists_end_with_a_bookmark(client: httpx.AsyncClient, widgets: str) -> None:
    for name in ("a", "b"):
        ok(await client.post(widgets, json=widget(name)), 201)
    query = {"sendInitialEvents": "true", "allowWatchBookmarks": "true", "resourceVersionMatch": "NotOlderThan"}
    async with watching(client, widgets, **query) as events:
        assert sorted(await events.next_names(2)) == [("ADDED", "a"), ("ADDED", "b")]
        kind, bookmark = await events.next()
    assert kind == "BOOKMARK"
    assert bookmark["kind"] == "Widget"
    assert bookmark["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


async def until_the_end(client: httpx.AsyncClient, path: str, api: Backend, since: str, *, write: Object | None = None):
    """All events of a watch of objects with a label, whose time ends after some seconds."""
    # The real server leaves its last bookmark two seconds before the end.
    query = {"allowWatchBookmarks": "true", "timeoutSeconds": "5" if api.real else "1", "labelSelector": "t"}
    found: list[tuple[str, Object]] = []
    async with watching(client, path, resourceVersion=since, **query) as events:
        if write is not None:
            ok(await client.post(path, json=write), 201)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                found.append(await events.next())
    return found


async def test_a_watch_ends_when_its_time_is_up_and_leaves_a_bookmark(
    api: Backend, client: httpx.AsyncClient, widgets: str
) -> None:
    since = ok(await client.post(widgets, json=widget()), 201)["metadata"]["resourceVersion"]
    found = await until_the_end(client, widgets, api, since, write=widget("unseen"))
    assert {kind for kind, _ in found} == {"BOOKMARK"}
    last = found[-1][1]["metadata"]["resourceVersion"]
    assert int(last) > int(since)
    async with watching(client, widgets, resourceVersion=last) as events:
        ok(await client.post(widgets, json=widget("b")), 201)
        assert await events.next_names(1) == [("ADDED", "b")]


async def test_a_watch_to_which_nothing_new_happened_leaves_no_bookmark(
    api: Backend, client: httpx.AsyncClient, widgets: str
) -> None:
    since = ok(await client.post(widgets, json=widget()), 201)["metadata"]["resourceVersion"]
    ok(await client.post("/api/v1/namespaces", json={"metadata": {"generateName": "test-"}}), 201)
    assert await until_the_end(client, widgets, api, since) == []


async def test_a_watch_replays_what_happened_since_a_version(client: httpx.AsyncClient, maps: str) -> None:
    ok(await client.post(maps, json=config_map("one")), 201)
    ok(await client.post(maps, json=config_map("two")), 201)
    ok(await client.delete(f"{maps}/one"))
    # Before the first object of this namespace, and as far back as there can be.
    async with watching(client, maps, resourceVersion="1") as events:
        assert await events.next_names(3) == [("ADDED", "one"), ("ADDED", "two"), ("DELETED", "one")]


async def test_a_version_too_old_is_gone(api: Backend, client: httpx.AsyncClient, maps: str) -> None:
    ok(await client.post(maps, json=config_map()), 201)
    with api.without_history() as later:
        async with later.client() as other, watching(other, maps, resourceVersion="1") as events:
            kind, status = await events.next()
    assert (kind, status["kind"], status["code"], status["reason"]) == ("ERROR", "Status", 410, "Expired")
    assert status["message"].startswith("too old resource version: 1 (")


@pytest.mark.parametrize(
    "query",
    [pytest.param({"limit": "abc"}, id="list"), pytest.param({"watch": "1", "timeoutSeconds": "abc"}, id="watch")],
)
async def test_options_that_are_no_numbers(client: httpx.AsyncClient, maps: str, query: dict[str, str]) -> None:
    status = refused(await client.get(maps, params=query), 400, "BadRequest")
    assert status["message"] == 'strconv.ParseInt: parsing "abc": invalid syntax'


async def test_pages_are_of_one_version(client: httpx.AsyncClient, maps: str) -> None:
    for name in ("a", "b", "c"):
        ok(await client.post(maps, json=config_map(name)), 201)
    first = ok(await client.get(maps, params={"limit": "1"}))
    ok(await client.delete(f"{maps}/b"))
    rest = ok(await client.get(maps, params={"limit": "5", "continue": first["metadata"]["continue"]}))
    assert [item["metadata"]["name"] for item in rest["items"]] == ["b", "c"]
    assert rest["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


async def test_an_apply_that_changes_nothing_is_no_event(client: httpx.AsyncClient, ns: str) -> None:
    path = f"/apis/apps/v1/namespaces/{ns}/deployments"
    first = ok(await apply(client, f"{path}/web", deployment()), 201)
    async with watching(client, path, resourceVersion=first["metadata"]["resourceVersion"]) as events:
        ok(await apply(client, f"{path}/web", deployment()))
        ok(await patch(client, f"{path}/web", {"metadata": {"labels": {"a": "b"}}}, MERGE))
        kind, obj = await events.next()
    assert kind == "MODIFIED"
    assert obj["metadata"]["labels"] == {"a": "b"}


async def test_every_namespace_can_be_watched_at_once(client: httpx.AsyncClient, ns: str, maps: str) -> None:
    version = ok(await client.get("/api/v1/configmaps"))["metadata"]["resourceVersion"]
    query = {"resourceVersion": version, "labelSelector": f"t={ns}"}
    async with watching(client, "/api/v1/configmaps", **query) as events:
        ok(await client.post(maps, json=config_map("one", labels={"t": ns})), 201)
        kind, obj = await events.next()
    assert (kind, obj["metadata"]["namespace"]) == ("ADDED", ns)
