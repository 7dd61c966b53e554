"""Server-side apply of the API server, fake and (where there is one) real: owners of fields, conflicts, what goes.

Not covered: the order of list items that two managers apply, which is not modelled; invariants for any sequence of
writes (test_ownership.py); what the controller applies (tests/kube/operator).
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.kube.calls import MERGE, STRATEGIC, apply, fields, ok, patch, refused
from tests.kube.samples import config_map, deployment, widget

pytestmark = pytest.mark.process


@pytest.fixture
def deployments(ns: str) -> str:
    return f"/apis/apps/v1/namespaces/{ns}/deployments"


@pytest.fixture
def maps(ns: str) -> str:
    return f"/api/v1/namespaces/{ns}/configmaps"


def owners(obj: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The owned fields by manager, operation and subresource."""
    entries = obj["metadata"].get("managedFields", [])
    return {(e["manager"], e["operation"], e.get("subresource", "")): e["fieldsV1"] for e in entries}


async def test_apply_creates_and_records_the_owner(client: httpx.AsyncClient, deployments: str) -> None:
    obj = ok(await apply(client, f"{deployments}/web", deployment(replicas=3)), 201)
    entry = obj["metadata"]["managedFields"][0]
    assert (entry["manager"], entry["operation"], entry["apiVersion"], entry["fieldsType"]) == (
        "me", "Apply", "apps/v1", "FieldsV1",
    )  # fmt: skip
    spec = entry["fieldsV1"]["f:spec"]
    assert spec["f:replicas"] == {}
    assert spec["f:selector"] == {}
    container = spec["f:template"]["f:spec"]["f:containers"]['k:{"name":"main"}']
    assert container == {
        ".": {}, "f:name": {}, "f:image": {},
        "f:ports": {'k:{"containerPort":80,"protocol":"TCP"}': {".": {}, "f:containerPort": {}}},
    }  # fmt: skip
    assert "f:strategy" not in spec


async def test_applying_the_same_again_changes_nothing(client: httpx.AsyncClient, deployments: str) -> None:
    body = deployment(replicas=3)
    body["spec"]["template"]["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "1000m"}}
    first = ok(await apply(client, f"{deployments}/web", body), 201)
    again = ok(await apply(client, f"{deployments}/web", body))
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert again["metadata"]["managedFields"] == first["metadata"]["managedFields"]


async def test_apply_needs_a_manager(client: httpx.AsyncClient, maps: str) -> None:
    answer = await patch(client, f"{maps}/c", config_map(), "application/apply-patch+yaml")
    assert answer.status_code in (400, 422)
    assert "fieldManager" in answer.text


async def test_a_field_of_another_manager_is_a_conflict(client: httpx.AsyncClient, deployments: str) -> None:
    ok(await apply(client, f"{deployments}/web", deployment(replicas=3), "one"), 201)
    changed = deployment(replicas=4)
    changed["spec"]["template"]["spec"]["containers"][0]["image"] = "web:2"
    status = refused(await apply(client, f"{deployments}/web", changed, "two"), 409, "Conflict")
    image = '.spec.template.spec.containers[name="main"].image'
    assert fields(status) == {".spec.replicas", image}
    assert {c["reason"] for c in status["details"]["causes"]} == {"FieldManagerConflict"}
    assert all('conflict with "one"' in c["message"] for c in status["details"]["causes"])
    assert status["message"].startswith("Apply failed with 2 conflicts: ")
    assert ok(await client.get(f"{deployments}/web"))["spec"]["replicas"] == 3


async def test_force_takes_the_field_over(client: httpx.AsyncClient, deployments: str) -> None:
    ok(await apply(client, f"{deployments}/web", deployment(replicas=3), "one"), 201)
    obj = ok(await apply(client, f"{deployments}/web", deployment(replicas=4), "two", force=True))
    assert obj["spec"]["replicas"] == 4
    owned = owners(obj)
    assert "f:replicas" not in owned["one", "Apply", ""]["f:spec"]
    assert "f:replicas" in owned["two", "Apply", ""]["f:spec"]


async def test_a_field_no_longer_applied_goes(client: httpx.AsyncClient, maps: str) -> None:
    ok(await apply(client, f"{maps}/c", config_map(data={"a": "1", "b": "2"})), 201)
    obj = ok(await apply(client, f"{maps}/c", config_map(data={"a": "1"})))
    assert obj["data"] == {"a": "1"}
    obj = ok(await apply(client, f"{maps}/c", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}))
    assert not obj.get("data")


async def test_labels_no_longer_applied_go(client: httpx.AsyncClient, maps: str) -> None:
    ok(await apply(client, f"{maps}/c", config_map(labels={"a": "1"}, annotations={"b": "2"})), 201)
    obj = ok(await apply(client, f"{maps}/c", config_map()))
    assert not {"labels", "annotations"} & set(obj["metadata"])
    assert obj["metadata"]["name"] == "c"


async def test_a_dropped_field_gets_its_default_back(client: httpx.AsyncClient, deployments: str) -> None:
    ok(await apply(client, f"{deployments}/web", deployment(replicas=3)), 201)
    obj = ok(await apply(client, f"{deployments}/web", deployment()))
    assert obj["spec"]["replicas"] == 1
    assert obj["metadata"]["generation"] == 2


async def test_a_dropped_structure_goes_with_its_defaults(client: httpx.AsyncClient, deployments: str) -> None:
    body = deployment()
    body["spec"]["template"]["spec"]["containers"][0]["livenessProbe"] = {"httpGet": {"port": 80, "path": "/h"}}
    first = ok(await apply(client, f"{deployments}/web", body), 201)
    assert first["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["periodSeconds"] == 10
    obj = ok(await apply(client, f"{deployments}/web", deployment()))
    assert "livenessProbe" not in obj["spec"]["template"]["spec"]["containers"][0]


async def test_a_field_two_managers_apply_stays_until_both_drop_it(client: httpx.AsyncClient, maps: str) -> None:
    ok(await apply(client, f"{maps}/c", config_map(data={"a": "1", "b": "2"}), "one"), 201)
    ok(await apply(client, f"{maps}/c", config_map(data={"a": "1"}), "two"))
    bare = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    assert ok(await apply(client, f"{maps}/c", bare, "one"))["data"] == {"a": "1"}
    assert not ok(await apply(client, f"{maps}/c", bare, "two")).get("data")


async def test_fields_of_others_are_left_alone(client: httpx.AsyncClient, deployments: str) -> None:
    ok(await apply(client, f"{deployments}/web", deployment()), 201)
    ok(await patch(client, f"{deployments}/web", {"spec": {"replicas": 7}}, MERGE, fieldManager="scaler"))
    note = {"metadata": {"annotations": {"note": "x"}}}
    ok(await patch(client, f"{deployments}/web", note, MERGE, fieldManager="person"))
    side = {"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "side:1"}]}}}}
    ok(await patch(client, f"{deployments}/web", side, STRATEGIC, fieldManager="injector"))
    body = deployment()
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "web:2"
    obj = ok(await apply(client, f"{deployments}/web", body))
    assert obj["spec"]["replicas"] == 7
    assert obj["metadata"]["annotations"] == {"note": "x"}
    images = {c["name"]: c["image"] for c in obj["spec"]["template"]["spec"]["containers"]}
    assert images == {"main": "web:2", "side": "side:1"}


async def test_who_changes_a_field_owns_it(client: httpx.AsyncClient, deployments: str) -> None:
    ok(await apply(client, f"{deployments}/web", deployment(replicas=3), "one"), 201)
    obj = ok(await patch(client, f"{deployments}/web", {"spec": {"replicas": 5}}, MERGE, fieldManager="person"))
    owned = owners(obj)
    assert "f:replicas" not in owned["one", "Apply", ""]["f:spec"]
    assert owned["person", "Update", ""] == {"f:spec": {"f:replicas": {}}}
    status = refused(await apply(client, f"{deployments}/web", deployment(replicas=3), "one"), 409, "Conflict")
    assert 'conflict with "person" using apps/v1' in status["details"]["causes"][0]["message"]


async def test_items_of_a_keyed_list_are_owned_one_by_one(client: httpx.AsyncClient, widgets: str) -> None:
    ok(await apply(client, f"{widgets}/a", widget(parts=[{"name": "x", "size": 1}]), "one"), 201)
    both = widget(parts=[{"name": "y", "size": 2}])
    obj = ok(await apply(client, f"{widgets}/a", both, "two"))
    assert {p["name"]: p["size"] for p in obj["spec"]["parts"]} == {"x": 1, "y": 2}
    part = owners(obj)["two", "Apply", ""]["f:spec"]["f:parts"]
    assert part == {'k:{"name":"y"}': {".": {}, "f:name": {}, "f:size": {}}}
    obj = ok(await apply(client, f"{widgets}/a", widget(), "one"))
    assert [p["name"] for p in obj["spec"]["parts"]] == ["y"]


async def test_a_plain_list_has_one_owner(client: httpx.AsyncClient, widgets: str) -> None:
    ok(await apply(client, f"{widgets}/a", widget(args=["a", "b"]), "one"), 201)
    status = refused(await apply(client, f"{widgets}/a", widget(args=["c"]), "two"), 409, "Conflict")
    assert fields(status) == {".spec.args"}
    assert ok(await apply(client, f"{widgets}/a", widget(args=["c"]), "two", force=True))["spec"]["args"] == ["c"]


async def test_status_is_applied_through_its_subresource(client: httpx.AsyncClient, widgets: str) -> None:
    body = {key: value for key, value in widget().items() if key != "spec"}
    ready = {**body, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    refused(await apply(client, f"{widgets}/a/status", ready, "controller"), 404, "NotFound")
    ok(await apply(client, f"{widgets}/a", widget(), "person"), 201)
    obj = ok(await apply(client, f"{widgets}/a/status", ready, "controller"))
    assert obj["status"] == ready["status"]
    assert obj["spec"]["model"] == "gpt2"
    assert obj["metadata"]["generation"] == 1
    condition: dict[str, Any] = {'k:{"type":"Ready"}': {".": {}, "f:status": {}, "f:type": {}}}
    assert owners(obj)["controller", "Apply", "status"] == {"f:status": {"f:conditions": condition}}
    again = ok(await apply(client, f"{widgets}/a", widget(), "person"))
    assert again["metadata"]["resourceVersion"] == obj["metadata"]["resourceVersion"]
    obj = ok(await apply(client, f"{widgets}/a/status", {**body, "status": {}}, "controller"))
    assert not obj["status"].get("conditions")


async def test_an_applied_custom_resource_is_judged_whole(client: httpx.AsyncClient, widgets: str) -> None:
    ok(await apply(client, f"{widgets}/a", widget(max=5)), 201)
    part = {**widget(), "spec": {"min": 6}}
    status = refused(await apply(client, f"{widgets}/a", part, "two"), 422, "Invalid")
    assert fields(status) == {"spec.min"}


async def test_a_version_given_with_apply_is_a_lock(client: httpx.AsyncClient, maps: str) -> None:
    first = ok(await apply(client, f"{maps}/c", config_map(data={"a": "1"})), 201)
    ok(await apply(client, f"{maps}/c", config_map(data={"a": "2"})))
    stale = config_map(data={"a": "3"}, resourceVersion=first["metadata"]["resourceVersion"])
    refused(await apply(client, f"{maps}/c", stale), 409, "Conflict")


async def test_owner_references_and_labels_are_applied_by_key(client: httpx.AsyncClient, maps: str) -> None:
    owner = ok(await client.post(maps, json=config_map("owner")), 201)["metadata"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["uid"]}
    body = config_map(labels={"x": "1"}, ownerReferences=[reference])
    obj = ok(await apply(client, f"{maps}/c", body), 201)
    assert obj["metadata"]["ownerReferences"] == [reference]
    owned = owners(obj)["me", "Apply", ""]["f:metadata"]
    assert list(owned["f:ownerReferences"]) == [f'k:{{"uid":"{owner["uid"]}"}}']
    ok(await patch(client, f"{maps}/c", {"metadata": {"labels": {"y": "2"}}}))
    assert ok(await apply(client, f"{maps}/c", config_map(ownerReferences=[reference])))["metadata"]["labels"] == {
        "y": "2"
    }


ILL_TYPED = [
    pytest.param({"nonsense": {"x": 1}}, ".nonsense: field not declared in schema", id="unknown"),
    pytest.param({"securityContext": {"x": 1}}, ".securityContext.x: field not declared in schema", id="below"),
    pytest.param({"securityContext": {"runAsUser": "x"}},
                 ".securityContext.runAsUser: expected numeric (int or float), got string", id="type"),
    pytest.param({"args": "x"}, ".args: expected list, got &{x}", id="list"),
    pytest.param({"env": [{"name": "A"}, {"name": "A"}]}, '.env: duplicate entries for key [name="A"]', id="twice"),
]  # fmt: skip


@pytest.mark.parametrize(("fields_", "fault"), ILL_TYPED)
async def test_what_does_not_fit_its_schema_is_an_error_of_the_servers_own(
    client: httpx.AsyncClient, deployments: str, fields_: dict[str, Any], fault: str
) -> None:
    manifest = deployment(replicas=1)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    container.update(fields_)
    answer = await apply(client, f"{deployments}/web", manifest)
    assert answer.status_code == 500
    assert answer.json().get("reason") is None
    assert answer.json()["message"].startswith("failed to create typed patch object (")
    assert answer.json()["message"].endswith(f'.spec.template.spec.containers[name="{container["name"]}"]{fault}')
    assert (await client.get(f"{deployments}/web")).status_code == 404
