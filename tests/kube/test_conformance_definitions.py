"""What the API server, fake and (where there is one) real, refuses of a CRD: for its rules, their costs, its defaults.

Not covered: rules with macros, functions of Kubernetes' own or messageExpression, which are not modelled; rules that an
object breaks (test_conformance.py); the product's own rules (tests/controller/test_crd.py).
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from controller.api.crd import crd
from tests.kube.calls import ok, refused
from tests.kube.conftest import DEFINITIONS

Object = dict[str, Any]
ROOT = "spec.validation.openAPIV3Schema"


def definition(spec: Object, **more: Object) -> Object:
    """A CRD whose objects have this spec."""
    schema = {"type": "object", "properties": {"spec": spec, **more}}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"plural": "gadgets", "singular": "gadget", "kind": "Gadget", "listKind": "GadgetList"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "gadgets.rules.example.dev"},
        "spec": {"group": "rules.example.dev", "scope": "Namespaced", "names": names, "versions": [version]},
    }  # fmt: skip


def ruled(rule: str, *, spec: Object | None = None, **more: Any) -> Object:
    """A spec with a rule over its fields."""
    fields = {
        "a": {"type": "integer", "default": 1},
        "b": {"type": "integer"},
        "text": {"type": "string"},
        "short": {"type": "string", "maxLength": 10},
        "words": {"type": "array", "items": {"type": "string"}},
        "few": {"type": "array", "maxItems": 4, "items": {"type": "string", "maxLength": 10}},
        "a-b": {"type": "integer"},
        "namespace": {"type": "string", "maxLength": 63},
    }
    rules = [{"rule": rule, **more}]
    return {"type": "object", "properties": fields, "x-kubernetes-validations": rules, **(spec or {})}


async def send(client: httpx.AsyncClient, spec: Object, **more: Object) -> httpx.Response:
    return await client.post(DEFINITIONS, json=definition(spec, **more), params={"dryRun": "All"})


@pytest.mark.parametrize(
    "rule",
    [
        "self.a > 0", "!has(self.b) || self.a < self.b", "size(self.text) < 100", "self.short.matches('^[a-z]+$')",
        "self.words.size() < 5", "self.a__dash__b > 1", "self.__namespace__ == 'x'", "self.a == oldSelf.a",
        "self.few == ['x', 'y']", "self.text == 'x'", "self == oldSelf", "self.short in ['x', 'y']",
        "size(self.few) < 2 || self.few[0] != self.few[1]",
    ],
)  # fmt: skip
async def test_rules_that_are_taken(client: httpx.AsyncClient, rule: str) -> None:
    ok(await send(client, ruled(rule)), 201)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("self.a +", "compilation failed"),
        ("self.nothing == 1", "undefined field 'nothing'"),
        ("self.a + 1", "must evaluate to a bool"),
        ("self.text > 1", "found no matching overload for '_>_'"),
        ("self.text.all(c, c == 'x')", "compilation failed"),
        ("cel.bind(n, self.a, n == 1)", "undeclared reference to 'cel'"),
        ("self.text.matches(self.text)", "estimated rule cost exceeds budget by factor of more than 100x"),
        ("self.text.matches('" + "x" * 600 + "')", "estimated rule cost exceeds budget by factor of 4.7x"),
        ("self.text.matches('" + "x" * 150 + "')", "estimated rule cost exceeds budget by factor of 1.195378x"),
    ],
)  # fmt: skip
async def test_rules_that_are_refused(client: httpx.AsyncClient, rule: str, words: str) -> None:
    status = refused(await send(client, ruled(rule)), 422, "Invalid")
    where = f"{ROOT}.properties[spec].x-kubernetes-validations[0].rule"
    assert where in {cause["field"] for cause in status["details"]["causes"]}
    assert words in status["message"]


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        pytest.param({"message": "two\nlines"}, "message", "must not contain line breaks", id="message"),
        pytest.param({"fieldPath": ".nothing"}, "fieldPath", "must be a valid path", id="fieldPath"),
    ],
)
async def test_a_rule_whose_other_fields_are_wrong(
    client: httpx.AsyncClient, more: Object, field: str, words: str
) -> None:
    status = refused(await send(client, ruled("self.a > 0", **more)), 422, "Invalid")
    where = f"{ROOT}.properties[spec].x-kubernetes-validations[0].{field}"
    assert where in {cause["field"] for cause in status["details"]["causes"]}
    assert words in status["message"]


async def test_a_rule_costs_as_often_as_its_value_can_occur(client: httpx.AsyncClient) -> None:
    item = {
        "type": "string", "maxLength": 100,
        "x-kubernetes-validations": [{"rule": "self.matches('^(one|two|three|four|five|six|seven|eight|nine|ten)$')"}],
    }  # fmt: skip
    few = {"type": "object", "properties": {"items": {"type": "array", "maxItems": 100, "items": item}}}
    ok(await send(client, few), 201)
    many = {"type": "object", "properties": {"items": {"type": "array", "items": item}}}
    status = refused(await send(client, many), 422, "Invalid")
    assert "estimated rule cost exceeds budget" in status["message"]


async def test_all_rules_together_have_a_budget(client: httpx.AsyncClient) -> None:
    # Each costs a little less than a rule may.
    text = {"type": "string", "x-kubernetes-validations": [{"rule": "self.matches('" + "x" * 120 + "')"}]}
    ok(await send(client, {"type": "object", "properties": {f"f{n}": text for n in range(10)}}), 201)
    status = refused(
        await send(client, {"type": "object", "properties": {f"f{n}": text for n in range(12)}}), 422, "Invalid"
    )
    assert "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema exceeds" in status["message"]


async def test_an_old_value_is_known_where_items_have_keys(client: httpx.AsyncClient) -> None:
    item = {
        "type": "object", "required": ["name"], "properties": {"name": {"type": "string", "maxLength": 10}},
        "x-kubernetes-validations": [{"rule": "self == oldSelf"}],
    }  # fmt: skip
    keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    items = {"type": "array", "maxItems": 3, "items": item}
    ok(await send(client, {"type": "object", "properties": {"items": {**items, **keyed}}}), 201)
    status = refused(await send(client, {"type": "object", "properties": {"items": items}}), 422, "Invalid")
    assert "oldSelf cannot be used on the uncorrelatable portion of the schema" in status["message"]


async def test_a_rule_must_hold_on_a_default_as_it_is_written(client: httpx.AsyncClient) -> None:
    # A nested default would make the rule hold, but is not filled in before it is judged.
    status = refused(await send(client, ruled("self.a > 0", spec={"default": {}})), 422, "Invalid")
    assert status["details"]["causes"][0]["field"] == f"{ROOT}.properties[spec].default"
    assert "no such key: a evaluating rule: self.a > 0" in status["message"]
    ok(await send(client, ruled("self.a > 0", spec={"default": {"a": 1}})), 201)
    wrong = refused(await send(client, ruled("self.a > 0", spec={"default": {"a": 0}})), 422, "Invalid")
    assert "failed rule: self.a > 0" in wrong["message"]


async def test_a_default_has_no_field_that_the_schema_does_not_know(client: httpx.AsyncClient) -> None:
    status = refused(await send(client, ruled("self.a > 0", spec={"default": {"a": 1, "odd": 2}})), 422, "Invalid")
    assert "must not have unknown fields" in status["message"]


async def test_a_rule_at_the_root_may_read_the_name(client: httpx.AsyncClient) -> None:
    # The name is a string without bounds to the estimate, unless the schema bounds it and the generated one.
    rule = {"rule": "self.metadata.name.matches('" + "x" * 200 + "')"}
    unbounded = definition({"type": "object"})
    schema = unbounded["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["x-kubernetes-validations"] = [rule]
    status = refused(await client.post(DEFINITIONS, json=unbounded, params={"dryRun": "All"}), 422, "Invalid")
    assert "estimated rule cost exceeds budget by factor of 1.6x" in status["message"]
    name = {"type": "string", "maxLength": 253}
    metadata = {"type": "object", "properties": {"name": name, "generateName": name}}
    schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": metadata}
    ok(await client.post(DEFINITIONS, json=unbounded, params={"dryRun": "All"}), 201)


async def test_the_products_definition_is_stored_as_it_is_written(client: httpx.AsyncClient) -> None:
    # What the server leaves out would be a conflict for the second who applies the same file: versions have one owner.
    stored = ok(await client.post(DEFINITIONS, json=crd(), params={"dryRun": "All"}), 201)
    assert stored["spec"]["versions"] == crd()["spec"]["versions"]


async def test_a_group_of_kubernetes_own_needs_to_be_approved(client: httpx.AsyncClient) -> None:
    foreign = definition({"type": "object"})
    foreign["spec"]["group"] = "rules.k8s.io"
    foreign["metadata"]["name"] = "gadgets.rules.k8s.io"
    status = refused(await client.post(DEFINITIONS, json=foreign, params={"dryRun": "All"}), 422, "Invalid")
    annotation = "api-approved.kubernetes.io"
    assert {cause["field"] for cause in status["details"]["causes"]} == {f"metadata.annotations[{annotation}]"}
    foreign["metadata"]["annotations"] = {annotation: "https://github.com/kubernetes/enhancements/pull/1"}
    ok(await client.post(DEFINITIONS, json=foreign, params={"dryRun": "All"}), 201)
