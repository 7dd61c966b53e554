"""Estimated costs of CEL rules are those of the real code.

`cel-costs.json` holds what Kubernetes 1.36.2's own estimate (`cel.Compile` of k8s.io/apiextensions-apiserver) says of
rules over one object's fields. Not covered: rules that are not modelled; how often a value can occur, and the budgets
(test_conformance_definitions.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.kube.apiserver import celcost
from tests.kube.apiserver.cel import checked
from tests.kube.apiserver.celtypes import declared
from tests.kube.apiserver.schema import structural

RECORDED = Path(__file__).parents[1] / "data" / "kubernetes" / "cel-costs.json"


def test_every_estimate_is_what_kubernetes_estimates() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    kind = declared(structural({"type": "object", "properties": recorded["fields"]}))
    assert kind is not None
    assert kind.cardinality == 1_048_576
    found = {rule: celcost.estimate(checked(rule, kind), kind) for rule in recorded["costs"]}
    assert found == recorded["costs"]
