"""Pure parts of the fake API server in cases beyond the conformance tests: quantities, paths, costs of rules.

Not covered: validation and patches, which test_conformance*.py hold to the real server; rules that are not modelled,
and budgets of rules (test_conformance_definitions.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kube.apiserver import celcost
from tests.kube.apiserver.cel import checked
from tests.kube.apiserver.celtypes import declared
from tests.kube.apiserver.fieldsets import decode, encode
from tests.kube.apiserver.normalization import canonical_quantity
from tests.kube.apiserver.schema import structural
from tests.kube.apiserver.selectors import labels_match, selector_matches
from tests.kube.apiserver.tables import first


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("1000m", "1"), ("0.5", "500m"), ("1500m", "1500m"), (2, "2"), (0.1, "100m"), ("0", "0"), ("2000", "2k"),
        ("1024Mi", "1Gi"), ("1.5Gi", "1536Mi"), ("1000Ki", "1000Ki"), ("2048Ki", "2Mi"), ("512", "512"),
        ("100000k", "100M"), ("0.5Gi", "512Mi"), ("-1", "-1"),
    ],
)  # fmt: skip
def test_quantities(written: Any, canonical: str) -> None:
    assert canonical_quantity(written) == canonical
    assert canonical_quantity(canonical) == canonical


def test_paths() -> None:
    conditions = [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]
    obj = {"status": {"conditions": conditions}}
    assert first(obj, '.status.conditions[?(@.type=="Ready")].status') == "True"
    assert first(obj, ".status.nothing.there") is None
    assert first({}, '.status.conditions[?(@.type=="Ready")].status') is None
    with pytest.raises(ValueError, match="list"):
        first(obj, ".list[-1].n")


def test_label_selectors() -> None:
    obj = {"metadata": {"labels": {"a": "1", "b": "x"}}}
    assert all(labels_match(text)(obj) for text in ("a=1", "a==1,b", "a in (1, 2)", "c notin (1)", "!c", "a!=2", ""))
    assert not any(labels_match(text)(obj) for text in ("a=2", "c", "!a", "a notin (1)", "b in (y)"))
    terms = [{"key": "a", "operator": "In", "values": ["1"]}, {"key": "c", "operator": "DoesNotExist"}]
    assert selector_matches({"matchLabels": {"b": "x"}, "matchExpressions": terms}, {"a": "1", "b": "x"})
    assert selector_matches({}, {})
    assert not selector_matches(None, {})


def test_field_sets_are_written_as_they_are_read() -> None:
    raw = {
        "f:metadata": {"f:labels": {".": {}, "f:a": {}}},
        "f:spec": {'k:{"name":"x"}': {".": {}, "f:image": {}}, "f:finalizers": {'v:"a/b"': {}}},
    }
    assert encode(decode(raw)) == raw


RECORDED = Path(__file__).parents[1] / "data" / "kubernetes" / "cel-costs.json"


def test_every_estimate_is_what_kubernetes_estimates() -> None:
    """Costs of rules by Kubernetes 1.36.2's own estimate (`cel.Compile` of k8s.io/apiextensions-apiserver)."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    kind = declared(structural({"type": "object", "properties": recorded["fields"]}))
    assert kind is not None
    assert kind.cardinality == 1_048_576
    found = {rule: celcost.estimate(checked(rule, kind), kind) for rule in recorded["costs"]}
    assert found == recorded["costs"]
