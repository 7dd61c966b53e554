"""The API server, fake and (where there is one) real: discovery, schemas, versions, subresources, tables.

Each test runs against the fake API server and, where there is one, against a real kube-apiserver with etcd: what passes
on both pins the one to the other. Bare API servers have no controllers, so nothing here waits for one.

Not covered: what is not modelled (docs/decisions/020-the-test-bed-models-what-tests-ask-for.md); built-in kinds
(test_conformance_objects.py), definitions that are refused for their rules (test_conformance_definitions.py).
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.kube.calls import fields, ok, patch, refused
from tests.kube.samples import GROUP, WIDGETS, deployment, widget, widget_definition

pytestmark = pytest.mark.process

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


# Discovery


async def test_discovery_names_built_in_and_custom_resources(client: httpx.AsyncClient, widgets: str) -> None:
    core = {r["name"]: r for r in ok(await client.get("/api/v1"))["resources"]}
    assert {"pods", "pods/status", "pods/proxy", "services", "namespaces"} <= set(core)
    groups = {g["name"] for g in ok(await client.get("/apis"))["groups"]}
    assert {"apps", "rbac.authorization.k8s.io", "policy", "autoscaling", GROUP} <= groups
    listed = {r["name"]: r for r in ok(await client.get(WIDGETS))["resources"]}
    assert listed["widgets"]["shortNames"] == ["wd"]
    assert listed["widgets/scale"]["kind"] == "Scale"
    assert listed["widgets/status"]["verbs"] == ["get", "patch", "update"]


async def test_openapi_describes_a_custom_resource(client: httpx.AsyncClient, widgets: str) -> None:
    async def schemas() -> dict[str, Any]:
        where = ok(await client.get("/openapi/v3"))["paths"].get(f"apis/{GROUP}/v1alpha1")
        return ok(await client.get(where["serverRelativeURL"]))["components"]["schemas"] if where else {}

    async with asyncio.timeout(30):  # a real server publishes it a moment after the CRD is served
        while not (found := await schemas()):  # noqa: ASYNC110  nothing tells when
            await asyncio.sleep(0.1)
    schema = next(s for name, s in found.items() if name.endswith(".Widget"))
    assert schema["properties"]["spec"]["properties"]["model"]["description"] == "The model to serve."


# Schemas


async def test_defaults_are_filled_in_at_every_level(client: httpx.AsyncClient, widgets: str) -> None:
    obj = ok(await client.post(widgets, json=widget(parts=[{"name": "x"}])), 201)
    assert obj["spec"] == {
        "model": "gpt2", "mode": "fast", "min": 1, "blockSize": 16, "workers": {"replicas": 2},
        "parts": [{"name": "x", "size": 1}],
    }  # fmt: skip
    assert obj["metadata"]["generation"] == 1
    assert obj["metadata"]["uid"]
    assert obj["metadata"]["creationTimestamp"].endswith("Z")


async def test_unknown_fields_are_dropped_and_warned_of(client: httpx.AsyncClient, widgets: str) -> None:
    body = widget(colour="red", extra={"kept": {"deep": 1}}, workers={"speed": 3})
    answer = await client.post(widgets, json=body)
    spec = ok(answer, 201)["spec"]
    assert "colour" not in spec
    assert spec["workers"] == {"replicas": 2}
    assert spec["extra"] == {"kept": {"deep": 1}}
    warnings = answer.headers.get_list("warning")
    assert any('unknown field \\"spec.colour\\"' in warning for warning in warnings)
    assert any('unknown field \\"spec.workers.speed\\"' in warning for warning in warnings)


async def test_strict_validation_refuses_unknown_fields(client: httpx.AsyncClient, widgets: str) -> None:
    answer = await client.post(widgets, json=widget(colour="red"), params={"fieldValidation": "Strict"})
    assert 'strict decoding error: unknown field "spec.colour"' in refused(answer, 400, "BadRequest")["message"]
    answer = await client.post(
        f"/apis/apps/v1/namespaces/{widgets.split('/')[5]}/deployments", json=deployment(replica=2),
        params={"fieldValidation": "Strict"},
    )  # fmt: skip
    assert 'unknown field "spec.replica"' in refused(answer, 400, "BadRequest")["message"]


async def test_a_wrong_value_beside_an_unknown_field(client: httpx.AsyncClient, widgets: str) -> None:
    # Strictly read, an object with an unknown field is not looked at any further; else both are named.
    body = widget(colour="red", max=101)
    strict = refused(await client.post(widgets, json=body, params={"fieldValidation": "Strict"}), 400, "BadRequest")
    assert "spec.max" not in strict["message"]
    answer = await client.post(widgets, json=body, params={"fieldValidation": "Warn"})
    assert fields(refused(answer, 422, "Invalid")) == {"spec.max"}
    assert any('unknown field \\"spec.colour\\"' in warning for warning in answer.headers.get_list("warning"))


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        pytest.param(spec, field, message, id=called)
        for called, spec, field, message in (
            ("minimum", {"workers": {"replicas": -1}}, "spec.workers.replicas", "should be greater than or equal to 0"),
            ("maximum", {"max": 101}, "spec.max", "should be less than or equal to 100"),
            ("enum", {"mode": "odd"}, "spec.mode", 'Unsupported value: "odd": supported values: "fast", "slow"'),
            ("too short", {"model": ""}, "spec.model", "should be at least 1 chars long"),
            ("too long", {"model": "m" * 21}, "spec.model", "Too long: may not be more than 20 bytes"),
            ("type", {"min": "one"}, "spec.min", 'must be of type integer: "string"'),
            ("pattern", {"code": "A1"}, "spec.code", "should match '^[a-z]+$'"),
            ("format", {"since": "yesterday"}, "spec.since", "must be of type date-time"),
            ("required", {"parts": [{"size": 1}]}, "spec.parts[0].name", "Required value"),
            ("too many", {"parts": [{"name": n} for n in "abcd"]}, "spec.parts", "Too many: 4: must have at most 3"),
            ("duplicate", {"parts": [{"name": "a"}, {"name": "a"}]}, "spec.parts[1]", "Duplicate value"),
            ("int or string", {"port": True}, "spec.port", "must be of type integer,string"),
            ("map", {"labels": {"a": 1}}, "spec.labels.a", "must be of type string"),
            ("rule with a field", {"min": 5, "max": 3}, "spec.min", "min exceeds max"),
            ("rule", {"mode": "slow", "code": "a"}, "spec", "slow widgets have no code"),
        )
    ],
)
async def test_what_the_schema_forbids_is_refused_with_the_field_named(
    client: httpx.AsyncClient, widgets: str, spec: dict[str, Any], field: str, message: str
) -> None:
    status = refused(await client.post(widgets, json=widget(**spec)), 422, "Invalid")
    assert field in fields(status)
    assert status["message"].startswith(f'Widget.{GROUP} "a" is invalid: ')
    assert f"{field}: " in status["message"]
    assert message in status["message"]
    assert status["details"]["name"] == "a"
    assert status["details"]["group"] == GROUP
    assert status["details"]["kind"] == "Widget"


async def test_a_required_field_that_is_missing(client: httpx.AsyncClient, widgets: str) -> None:
    body = widget()
    del body["spec"]["model"]
    status = refused(await client.post(widgets, json=body), 422, "Invalid")
    assert {c["field"]: c["reason"] for c in status["details"]["causes"]}["spec.model"] == "FieldValueRequired"


async def test_transition_rules_hold_between_old_and_new(client: httpx.AsyncClient, widgets: str) -> None:
    ok(await client.post(widgets, json=widget(blockSize=32)), 201)
    status = refused(await patch(client, f"{widgets}/a", {"spec": {"blockSize": 16}}), 422, "Invalid")
    assert fields(status) == {"spec.blockSize"}
    assert "blockSize is immutable" in status["message"]
    ok(await patch(client, f"{widgets}/a", {"spec": {"mode": "slow"}}))


async def test_a_definition_that_is_not_structural_is_refused(client: httpx.AsyncClient) -> None:
    broken = widget_definition()
    schema = broken["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["properties"]["model"].pop("type")
    schema["properties"]["spec"]["x-kubernetes-validations"][0]["rule"] = "self.nothing > 1"
    broken["spec"]["group"] = "broken.example.dev"
    broken["metadata"]["name"] = "widgets.broken.example.dev"
    status = refused(await client.post(DEFINITIONS, json=broken), 422, "Invalid")
    assert "must not be empty for specified object fields" in status["message"]


async def test_a_rule_that_names_no_field_is_refused(client: httpx.AsyncClient) -> None:
    broken = widget_definition()
    spec = broken["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["x-kubernetes-validations"] = [{"rule": "self.nothing > 1"}]
    broken["spec"]["group"] = "broken.example.dev"
    broken["metadata"]["name"] = "widgets.broken.example.dev"
    status = refused(await client.post(DEFINITIONS, json=broken), 422, "Invalid")
    assert "undefined field 'nothing'" in status["message"]


# Versions, generations, subresources


async def test_generation_counts_changes_of_the_spec_only(client: httpx.AsyncClient, widgets: str) -> None:
    first = ok(await client.post(widgets, json=widget()), 201)
    labelled = ok(await patch(client, f"{widgets}/a", {"metadata": {"labels": {"x": "y"}}}))
    assert labelled["metadata"]["generation"] == 1
    assert int(labelled["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])
    changed = ok(await patch(client, f"{widgets}/a", {"spec": {"mode": "slow"}}))
    assert changed["metadata"]["generation"] == 2
    shown = ok(await patch(client, f"{widgets}/a/status", {"status": {"ready": 1}}))
    assert shown["metadata"]["generation"] == 2


async def test_a_write_that_changes_nothing_makes_no_new_version(client: httpx.AsyncClient, widgets: str) -> None:
    first = ok(await client.post(widgets, json=widget()), 201)
    again = ok(await patch(client, f"{widgets}/a", {"spec": {"mode": "fast"}}))
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    put = ok(await client.put(f"{widgets}/a", json=again))
    assert put["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


async def test_status_is_written_through_its_subresource_only(client: httpx.AsyncClient, widgets: str) -> None:
    created = ok(await client.post(widgets, json={**widget(), "status": {"ready": 7}}), 201)
    assert "status" not in created
    both = {"spec": {"mode": "slow"}, "status": {"ready": 1}, "metadata": {"labels": {"a": "b"}}}
    shown = ok(await patch(client, f"{widgets}/a/status", both))
    assert shown["status"] == {"ready": 1}
    assert shown["spec"]["mode"] == "fast"
    assert "labels" not in shown["metadata"]
    changed = ok(await patch(client, f"{widgets}/a", {"spec": {"mode": "slow"}, "status": {"ready": 9}}))
    assert changed["spec"]["mode"] == "slow"
    assert changed["status"] == {"ready": 1}
    assert ok(await client.get(f"{widgets}/a/status"))["status"] == {"ready": 1}


async def test_a_stale_version_is_a_conflict(client: httpx.AsyncClient, widgets: str) -> None:
    old = ok(await client.post(widgets, json=widget()), 201)
    ok(await patch(client, f"{widgets}/a", {"spec": {"mode": "slow"}}))
    old["spec"]["min"] = 2
    status = refused(await client.put(f"{widgets}/a", json=old), 409, "Conflict")
    assert "the object has been modified" in status["message"]
    stale = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"]}, "spec": {"min": 2}}
    refused(await patch(client, f"{widgets}/a", stale), 409, "Conflict")


async def test_scale_reads_and_writes_where_the_definition_says(client: httpx.AsyncClient, widgets: str) -> None:
    ok(await client.post(widgets, json=widget()), 201)
    ok(await patch(client, f"{widgets}/a/status", {"status": {"ready": 1, "selector": "app=a"}}))
    scale = ok(await client.get(f"{widgets}/a/scale"))
    assert scale["kind"] == "Scale"
    assert scale["spec"] == {"replicas": 2}
    assert scale["status"] == {"replicas": 1, "selector": "app=a"}
    scale["spec"]["replicas"] = 5
    ok(await client.put(f"{widgets}/a/scale", json=scale))
    obj = ok(await client.get(f"{widgets}/a"))
    assert obj["spec"]["workers"]["replicas"] == 5
    assert obj["metadata"]["generation"] == 2
    ok(await patch(client, f"{widgets}/a/scale", {"spec": {"replicas": 6}}))
    assert ok(await client.get(f"{widgets}/a"))["spec"]["workers"]["replicas"] == 6
    refused(await patch(client, f"{widgets}/a/scale", {"spec": {"replicas": -1}}), 422, "Invalid")


async def test_tables_have_the_columns_of_the_definition(client: httpx.AsyncClient, widgets: str) -> None:
    ok(await client.post(widgets, json=widget()), 201)
    conditions = [{"type": "Other", "status": "False"}, {"type": "Ready", "status": "True"}]
    ok(await patch(client, f"{widgets}/a/status", {"status": {"conditions": conditions}}))
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    table = ok(await client.get(widgets, headers={"Accept": accept}))
    assert table["kind"] == "Table"
    assert [c["name"] for c in table["columnDefinitions"]] == ["Name", "Model", "Workers", "Ready", "Mode", "Age"]
    assert [c["priority"] for c in table["columnDefinitions"]] == [0, 0, 0, 0, 1, 0]
    assert table["rows"][0]["cells"][:5] == ["a", "gpt2", 2, "True", "fast"]
    assert table["rows"][0]["object"]["metadata"]["name"] == "a"
