"""The condition GatewayAccepted: what gateways say of the InferencePool.

Not covered: how the pool is made and watched (tests/kube/operator/test_gateway.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from controller.api.gateway import Gateway
from controller.api.model import KVClusterSpec
from controller.status.conditions import evaluate
from controller.status.observed import Observed, ReconcileProblem
from controller.status.reasons import ConditionReason, ConditionType
from tests.controller.status.support import NOW

SPEC = KVClusterSpec(gateway=Gateway.model_validate({"inferencePool": True}))


def parent(name: str, **statuses: str) -> dict[str, Any]:
    """What one gateway says; of each type of condition its status."""
    conditions = [
        {"type": kind, "status": status, "reason": f"{kind}Reason", "message": f"{kind} of {name}"}
        for kind, status in statuses.items()
    ]
    return {"parentRef": {"name": name, "namespace": "infra"}, "conditions": conditions}


def accepted(pool: dict[str, Any] | None, *problems: ReconcileProblem, spec: KVClusterSpec = SPEC) -> list[Any]:
    observed = Observed("rag", "ns", 1, spec, pool=pool, problems=problems)
    return [each for each in evaluate(observed, [], NOW) if each.type is ConditionType.GATEWAY_ACCEPTED]


@pytest.mark.parametrize(
    ("parents", "status", "message"),
    [
        pytest.param([], "Unknown", "No gateway has said anything", id="no-gateway"),
        pytest.param([parent("a")], "Unknown", "No gateway has said anything", id="a-silent-gateway"),
        pytest.param([parent("a", Accepted="True")], "True", "Accepted by Gateway infra/a.", id="accepted"),
        pytest.param(
            [parent("b", Accepted="True"), parent("a", Accepted="True")],
            "True", "Accepted by Gateway infra/a, Gateway infra/b.", id="by-two",
        ),
        pytest.param(
            [parent("a", Accepted="True"), parent("b", Accepted="False")],
            "False", "Gateway infra/b (AcceptedReason): Accepted of b.", id="refused-by-one",
        ),
        pytest.param(
            [parent("a", Accepted="True", ResolvedRefs="False")],
            "False", "Gateway infra/a (ResolvedRefsReason): ResolvedRefs of a.", id="picker-not-found",
        ),
    ],
)  # fmt: skip
def test_what_the_gateways_say(parents: list[Any], status: str, message: str) -> None:
    (found,) = accepted({"status": {"parents": parents}})
    assert (found.status, message in found.message) == (status, True), found


def test_a_missing_crd_is_named_and_what_to_install() -> None:
    problem = ReconcileProblem(ConditionReason.MISSING_API, "InferencePool/rag-worker", "this cluster has no pools")
    (found,) = accepted(None, problem)
    assert (found.status, found.reason) == ("False", ConditionReason.MISSING_API)
    assert found.message == "This cluster has no pools: install the CRDs of the Gateway API Inference Extension."


def test_without_a_pool_there_is_no_such_condition() -> None:
    assert accepted(None, spec=KVClusterSpec()) == []
