"""Which pools an InferenceObjective is for.

Not covered: how objectives are followed at an API server (test_inference_pool.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from router.discovery.pool_objects import priorities_of, read_objective

LABELS = {"tier": "gold", "team": "search"}


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"poolSelector": {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}}


@pytest.mark.parametrize(
    ("target", "is_for"),
    [
        pytest.param({"poolRef": {"name": "llama"}}, True, id="a reference"),
        pytest.param({"poolRef": {"name": "other"}}, False, id="to another pool"),
        pytest.param({"poolRef": {"name": "llama", "group": "llm-d.ai", "kind": "InferencePool"}}, True, id="llm-d's"),
        pytest.param({"poolRef": {"name": "llama", "kind": "Service"}}, False, id="to another kind"),
        pytest.param({"poolRef": {"name": "llama", "group": "apps"}}, False, id="to another group"),
        pytest.param({"poolRefs": [{"name": "other"}, {"name": "llama"}]}, True, id="one of several"),
        pytest.param({"poolSelector": {"matchLabels": {"tier": "gold"}}}, True, id="labels"),
        pytest.param({"poolSelector": {"matchLabels": {"tier": "gold", "team": "ads"}}}, False, id="not all labels"),
        pytest.param({"poolSelector": {}}, True, id="any pool"),
        pytest.param(expression("tier", "In", "gold", "silver"), True, id="in"),
        pytest.param(expression("tier", "NotIn", "gold"), False, id="not in"),
        pytest.param(expression("zone", "NotIn", "a"), True, id="not in, without the label"),
        pytest.param(expression("team", "Exists"), True, id="exists"),
        pytest.param(expression("team", "DoesNotExist"), False, id="does not exist"),
        pytest.param(expression("team", "Gt", "1"), False, id="an operator that there is not"),
        pytest.param({"poolRef": {"name": "other"}, "poolSelector": {}}, True, id="either of two"),
        pytest.param({}, False, id="none"),
    ],
)
def test_an_objective_is_for_the_pools_that_it_names_or_selects(target: dict[str, Any], is_for: bool) -> None:
    objective = read_objective({"spec": {"priority": 3, **target}})
    assert priorities_of("llama", LABELS, [("chat", objective)]) == ({"chat": 3} if is_for else {})


def test_a_pool_whose_labels_are_not_known_is_selected_by_none() -> None:
    objective = read_objective({"spec": {"poolSelector": {}}})
    assert priorities_of("llama", None, [("chat", objective)]) == {}
    assert priorities_of("llama", {}, [("chat", objective)]) == {"chat": 0}
