"""The CRD: generated from the model, structural, with rules that an API server accepts within its cost limits.

Not covered: what an API server does with KVClusters by this CRD (tests/kube/operator/test_bad_input).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import kubernetes_validate

from controller.api.crd import CHART_FILE, crd, crd_yaml
from controller.api.fields import FIELDS
from controller.api.model import KVClusterSpec
from controller.api.routing import Strategy
from controller.api.rules import RULES
from tests.kube.apiserver import cel
from tests.kube.apiserver.customresources import faults
from tests.kube.apiserver.schema import structural

ROOT = Path(__file__).parents[2]


def schema() -> dict[str, Any]:
    result: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return result


def nodes(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, (*path, name))
    for name, part in (("items", "[]"), ("additionalProperties", "*")):
        if isinstance(node.get(name), dict):
            yield from nodes(node[name], (*path, part))


def test_the_charts_copy_is_the_generated_one():
    assert (ROOT / CHART_FILE).read_text(encoding="utf-8") == crd_yaml(), "run: python -m controller.api.crd"


def test_kubernetes_own_schema_takes_it():
    kubernetes_validate.validate(crd(), "1.32", strict=True)


def test_every_field_of_the_model_is_in_it_with_its_description():
    found = dict(nodes(schema()))
    for field in FIELDS:
        if field.path[0] != "spec":
            continue
        assert field.path in found, ".".join(field.path)
        assert found[field.path]["description"], ".".join(field.path)


def test_it_is_structural():
    for path, node in nodes(schema()):
        where = ".".join(path)
        assert "type" in node or node.get("x-kubernetes-int-or-string"), where
        assert not node.keys() & {"$ref", "title", "allOf", "oneOf", "const", "$defs"}, where
        assert node.get("anyOf") is None or node.get("x-kubernetes-int-or-string"), where
        assert not ("properties" in node and "additionalProperties" in node), where
        assert isinstance(node.get("exclusiveMinimum", True), bool), where
        assert node.get("type") != "array" or "x-kubernetes-list-type" in node, where


def test_every_default_is_written_out_whole():
    # A server judges a default as it is written, and rules read fields that only a nested default would fill in.
    for path, node in nodes(schema()):
        if isinstance(node.get("default"), dict):
            below = node["properties"]
            assert node["default"] == {name: below[name]["default"] for name in below if "default" in below[name]}, path


def test_a_spec_that_is_left_out_is_the_models_own_default():
    spec = schema()["properties"]["spec"]["default"]
    assert spec["router"]["strategy"] == Strategy.CACHE_AWARE
    assert KVClusterSpec.model_validate(spec) == KVClusterSpec()


def test_a_server_takes_it_within_half_of_the_cost_of_rules():
    assert list(faults(crd())) == []
    half = {"RULE_LIMIT": cel.RULE_LIMIT // 2, "TOTAL_LIMIT": cel.TOTAL_LIMIT // 2}
    with mock.patch.multiple(cel, **half):
        assert list(cel.check_rules(structural(schema()), resource=True)) == []


def test_everything_that_a_rule_reads_is_bounded():
    found = dict(nodes(schema()))
    bounds = {"string": {"maxLength", "enum", "format"}, "array": {"maxItems"}, "object": {"maxProperties"}}
    for path, rules in RULES.items():
        for rule in rules:
            beyond = re.sub(r"\b(?:has|size)\([\w.]*\)", "", rule.expression)
            for chain in re.findall(r"\b(?:self|oldSelf)((?:\.[a-z]\w*(?!\w*\())*)", rule.expression):
                node = found[(*path, *chain.split(".")[1:])]
                if "additionalProperties" in node and f"self{chain}" not in beyond:
                    continue  # how many keys a map has costs the same for any map
                if node.get("type") != "object" or "additionalProperties" in node:
                    assert node.keys() & bounds.get(node["type"], node.keys()), (path, chain)
        for end in range(len(path)):
            if path[end] == "[]":
                assert "maxItems" in found[path[:end]], path


def test_every_rule_stands_at_its_place_and_says_what_to_do():
    found = dict(nodes(schema()))
    for path, rules in RULES.items():
        standing = found[path]["x-kubernetes-validations"]
        assert [rule["rule"] for rule in standing] == [rule.expression for rule in rules]
        for rule in rules:
            assert len(rule.message) > 20
            if rule.field is not None:
                assert (*path, *rule.field.strip(".").split(".")) in found
