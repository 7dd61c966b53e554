"""The fake API server's schemas, rules, quantities and paths, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kube.apiserver.cel import broken_rules
from tests.kube.apiserver.celchecks import check_rules
from tests.kube.apiserver.fieldsets import decode, encode
from tests.kube.apiserver.jsonpath import find
from tests.kube.apiserver.patches import json_patch, merge_patch
from tests.kube.apiserver.schema import structural
from tests.kube.apiserver.selectors import labels_match, selector_matches
from tests.kube.apiserver.structural import canonical_quantity


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("1000m", "1"), ("0.5", "500m"), ("1500m", "1500m"), (2, "2"), (0.1, "100m"), ("0", "0"), ("2000", "2k"),
        ("1024Mi", "1Gi"), ("1.5Gi", "1536Mi"), ("1000Ki", "1000Ki"), ("2048Ki", "2Mi"), ("512", "512"), ("1e3", "1e3"),
        ("100000k", "100M"), ("0.5Gi", "512Mi"), ("-1", "-1"),
    ],
)  # fmt: skip
def test_quantities(written: Any, canonical: str) -> None:
    assert canonical_quantity(written) == canonical
    assert canonical_quantity(canonical) == canonical


RULED = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "integer"},
        "name": {"type": "string"},
        "memory": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
}


def judge(value: Any, *rules: dict[str, Any], old: Any = None) -> list[str]:
    node = structural({**RULED, "x-kubernetes-validations": list(rules)})
    assert not list(check_rules(node))
    return [cause.text() for cause in broken_rules(value, old, node, "spec")]


@pytest.mark.parametrize(
    "rule",
    [
        "self.a <= self.b", "has(self.name) && !has(self.tags)", "self.name.matches('^w[0-9]+$')",
        "self.name.startsWith('w') && size(self.name) == 2", "!has(self.tags) || self.tags.all(t, t != '')",
        "quantity(self.memory).isGreaterThan(quantity('500Mi'))", "isQuantity(self.memory) && !isQuantity('x')",
        "quantity(self.memory).compareTo(quantity('1024Mi')) == 0", "self.?tags.orValue([]).size() == 0",
        "[self.a, self.b].isSorted() && [self.a, self.b].sum() == 3", "self.name.find('[0-9]') == '1'",
        "['x', 'y'].exists_one(t, t == 'x')", "self.name in ['w1', 'w2']", "type(self.a) == int",
        "'a-b'.split('-') == ['a', 'b']", "isURL('http://x/y')",
        "[1, 2].map(n, n * 2) == [2, 4]", "duration('1h') > duration('59m')", "'%d-%s'.format([1, 'x']) == '1-x'",
    ],
)  # fmt: skip
def test_rules_that_hold(rule: str) -> None:
    assert judge({"a": 1, "b": 2, "name": "w1", "memory": "1Gi"}, {"rule": rule}) == []


def test_rules_say_why_they_do_not_hold() -> None:
    value = {"a": 3, "b": 2}
    assert judge(value, {"rule": "self.a <= self.b"}) == ["spec: Invalid value: failed rule: self.a <= self.b"]
    assert judge(value, {"rule": "self.a <= self.b", "message": "a is too big"}) == [
        "spec: Invalid value: a is too big"
    ]
    told = {"rule": "self.a <= self.b", "messageExpression": "'a is %d'.format([self.a])", "fieldPath": ".a"}
    assert judge(value, told) == ["spec.a: Invalid value: a is 3"]
    assert judge(value, {**told, "reason": "FieldValueForbidden"}) == ["spec.a: Forbidden: a is 3"]
    missing = judge(value, {"rule": "self.name == 'x'"})
    assert missing == ["spec: Invalid value: \"object\": no such key: name evaluating rule: self.name == 'x'"]


def test_rules_over_the_old_value() -> None:
    grows = {"rule": "self.a >= oldSelf.a", "message": "a never shrinks"}
    assert judge({"a": 1}, grows) == []
    assert judge({"a": 1}, grows, old={"a": 1}) == []
    assert judge({"a": 1}, grows, old={"a": 2}) == ["spec: Invalid value: a never shrinks"]
    first = {"rule": "oldSelf.hasValue() || self.a == 0", "optionalOldSelf": True, "message": "begin with 0"}
    assert judge({"a": 1}, first) == ["spec: Invalid value: begin with 0"]
    assert judge({"a": 1}, first, old={"a": 5}) == []


@pytest.mark.parametrize("rule", ["self.a +", "self.nothing == 1", "self.a + 1", "self.name.frobnicate()"])
def test_rules_that_are_none(rule: str) -> None:
    assert list(check_rules(structural({**RULED, "x-kubernetes-validations": [{"rule": rule}]})))


def test_paths() -> None:
    obj = {
        "status": {"conditions": [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]},
        "metadata": {"annotations": {"a.b/c": "x"}}, "list": [{"n": 1}, {"n": 2}],
    }  # fmt: skip
    assert find(obj, '.status.conditions[?(@.type=="Ready")].status') == ["True"]
    assert find(obj, ".status.conditions[?(@.type!='Ready')].type") == ["A"]
    assert find(obj, "list[*].n") == [1, 2]
    assert find(obj, ".list[-1].n") == [2]
    assert find(obj, ".metadata.annotations.a\\.b/c") == ["x"]
    assert find(obj, ".metadata.annotations['a.b/c']") == ["x"]
    assert find(obj, ".nothing.there") == []
    with pytest.raises(ValueError, match="not a JSONPath"):
        find(obj, ".list[?broken]")


def test_label_selectors() -> None:
    obj = {"metadata": {"labels": {"a": "1", "b": "x"}}}
    assert all(labels_match(text)(obj) for text in ("a=1", "a==1,b", "a in (1, 2)", "c notin (1)", "!c", "a!=2", ""))
    assert not any(labels_match(text)(obj) for text in ("a=2", "c", "!a", "a notin (1)", "b in (y)"))
    terms = [{"key": "a", "operator": "In", "values": ["1"]}, {"key": "c", "operator": "DoesNotExist"}]
    assert selector_matches({"matchLabels": {"b": "x"}, "matchExpressions": terms}, {"a": "1", "b": "x"})
    assert selector_matches({}, {})
    assert not selector_matches(None, {})


def test_patches_of_documents() -> None:
    assert merge_patch({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": None}, "d": [2], "e": {"f": None}}) == {
        "a": {"c": 2}, "d": [2], "e": {},
    }  # fmt: skip
    steps = [
        {"op": "add", "path": "/l/-", "value": 3}, {"op": "add", "path": "/l/0", "value": 0},
        {"op": "move", "from": "/m/x", "path": "/m/y"}, {"op": "copy", "from": "/l", "path": "/k"},
        {"op": "remove", "path": "/l/1"},
    ]  # fmt: skip
    assert json_patch({"l": [1], "m": {"x": 5}}, steps) == {"l": [0, 3], "m": {"y": 5}, "k": [0, 1, 3]}


def test_field_sets_are_written_as_they_are_read() -> None:
    raw = {
        "f:metadata": {"f:labels": {".": {}, "f:a": {}}},
        "f:spec": {'k:{"name":"x"}': {".": {}, "f:image": {}}, "f:finalizers": {'v:"a/b"': {}}},
    }
    assert encode(decode(raw)) == raw
