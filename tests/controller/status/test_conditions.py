"""The conditions of a KVCluster: availability, progress, problems of the controller, freshness of the caches' views.

Not covered: what is wrong with pods (test_pod_problems), and the rest of the status (test_status).
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest

from controller.api.autoscaling import Autoscaling
from controller.api.model import KVClusterSpec, Router
from controller.status.observed import Observed, ReconcileProblem
from controller.status.reasons import RECONCILE_PROBLEMS, ConditionReason
from controller.status.report import TokenizerReport
from tests.controller.status.support import (
    NOW,
    ROUTERS,
    WORKERS,
    ago,
    conditions,
    deployment,
    observed,
    pod,
    reasons,
    report,
)

HEALTHY = {
    "Ready": "True/Serving",
    "WorkersAvailable": "True/AllReady",
    "RouterAvailable": "True/AllReady",
    "CacheViewFresh": "True/Fresh",
    "Progressing": "False/Complete",
    "Degraded": "False/AsExpected",
}


def test_a_healthy_cluster():
    assert reasons(observed()) == HEALTHY
    assert {item["observedGeneration"] for item in conditions(observed()).values()} == {7}


def test_a_cluster_that_has_just_been_applied():
    assert reasons(Observed("rag", "ns", 1, observed().spec, workers_wanted=4)) == {
        "Ready": "False/NotCreated",
        "WorkersAvailable": "False/NotCreated",
        "RouterAvailable": "False/NotCreated",
        "CacheViewFresh": "Unknown/NoWorkers",
        "Progressing": "True/Creating",
        "Degraded": "False/AsExpected",
    }


@pytest.mark.parametrize(
    ("wanted", "ready", "expected"),
    [
        (1, 1, "True/AllReady"),
        (2, 1, "True/SomeReady"),
        (3, 2, "True/SomeReady"),
        (4, 3, "True/SomeReady"),
        (4, 2, "False/TooFewReady"),
        (8, 6, "True/SomeReady"),
        (8, 5, "False/TooFewReady"),
        (4, 5, "True/AllReady"),
        (0, 0, "False/ScaledToZero"),
        (0, 2, "False/ScaledToZero"),
    ],
)
def test_a_quarter_may_be_missing(wanted, ready, expected):
    load = deployment(wanted=wanted, readyReplicas=ready)
    seen = observed(deployments={"worker": load, "router": deployment("router", 2)}, workers_wanted=wanted)
    assert reasons(seen)["WorkersAvailable"] == expected
    assert reasons(seen)["Ready"] == ("True/Serving" if ready else "False/ScaledToZero")
    assert reasons(seen)["Degraded"] == "False/AsExpected"


SCALED_TO_ZERO = {"type": "keda", "min": 0, "max": 3, "prometheusAddress": "http://prometheus:9090"}


@pytest.mark.parametrize("wanted", [pytest.param(0, id="nobody asks"), pytest.param(1, id="a worker loads")])
def test_routers_that_hold_requests_for_a_worker_are_ready(wanted):
    spec = KVClusterSpec(router=Router(replicas=2), autoscaling=Autoscaling.model_validate(SCALED_TO_ZERO))
    load = deployment(wanted=wanted, readyReplicas=0)
    seen = observed(
        spec=spec, deployments={"worker": load, "router": deployment("router", 2)}, workers_wanted=wanted, pods=ROUTERS
    )
    assert reasons(seen)["Ready"] == "True/Holding"
    assert reasons(seen)["WorkersAvailable"] == ("False/NoneReady" if wanted else "False/ScaledToZero")
    without = dataclasses.replace(
        seen, deployments={"worker": load, "router": deployment("router", 2, readyReplicas=0)}
    )
    assert reasons(without)["Ready"].startswith("False/")
    problem = ReconcileProblem(
        ConditionReason.MISSING_API, "ScaledObject/rag-worker", "this cluster has no ScaledObject"
    )
    degraded = conditions(dataclasses.replace(seen, problems=(problem,)))["Degraded"]
    assert degraded["reason"] == "MissingApi"
    assert "spec.autoscaling.min: 0 needs KEDA" in degraded["message"]


def test_pods_on_top_of_those_wanted_do_not_change_the_message():
    more = deployment(readyReplicas=5, replicas=5)
    seen = observed(deployments={"worker": more, "router": deployment("router", 2)})
    assert conditions(seen)["WorkersAvailable"] == conditions(observed())["WorkersAvailable"]


def test_routers_without_workers_wait_for_them():
    starting = pod("rag-worker-0", ready=False)
    unready = [pod(router["metadata"]["name"], ready=False) for router in ROUTERS]
    seen = observed(
        pods=(starting, *unready),
        deployments={
            "worker": deployment(readyReplicas=None, availableReplicas=None),
            "router": deployment("router", 2, readyReplicas=None, availableReplicas=None),
        },
    )
    found = conditions(seen)
    assert reasons(seen) == {
        "Ready": "False/NoneReady",
        "WorkersAvailable": "False/NoneReady",
        "RouterAvailable": "False/WaitingForWorkers",
        "CacheViewFresh": "Unknown/NoWorkers",
        "Progressing": "True/Starting",
        "Degraded": "False/AsExpected",
    }
    assert found["Ready"]["message"] == (
        "Requests are not answered: 0 of 4 workers are ready. Pod rag-worker-0: runs, not ready."
    )


# --- problems of the controller ---


@pytest.mark.parametrize("reason", RECONCILE_PROBLEMS)
def test_problems_of_applying(reason):
    seen = observed(problems=(ReconcileProblem(reason, "Service/rag-router", "belongs to Helm release x"),))
    assert reasons(seen)["Degraded"] == f"True/{reason}"
    assert conditions(seen)["Degraded"]["message"] == "Service/rag-router: belongs to Helm release x"
    blocked = reason is not ConditionReason.MISSING_API
    assert reasons(seen)["Progressing"] == ("False/Blocked" if blocked else "False/Complete")
    assert reasons(seen)["Ready"] == "True/Serving"


def test_an_invalid_spec_leaves_what_runs_in_view():
    problems = tuple(ReconcileProblem(ConditionReason.INVALID_SPEC, f"spec.{name}", "is wrong.") for name in "abcde")
    seen = observed(spec=None, workers_wanted=None, problems=problems)
    assert reasons(seen) == {**HEALTHY, "Degraded": "True/InvalidSpec", "Progressing": "False/Blocked"}
    assert conditions(seen)["Degraded"]["message"] == (
        "spec.a: is wrong. spec.b: is wrong. spec.c: is wrong. And 2 more."
    )


@pytest.mark.parametrize(
    ("kind", "condition"), [("HorizontalPodAutoscaler", "ScalingActive"), ("ScaledObject", "Ready")]
)
def test_an_autoscaler_that_fails_has_two_minutes(kind, condition):
    def failing(reason: str, since: str) -> Observed:
        why = {"type": condition, "status": "False", "reason": reason, "message": "no metrics returned"}
        scaler = {
            "kind": kind,
            "metadata": {"name": "rag-worker"},
            "status": {"conditions": [{**why, "lastTransitionTime": since}]},
        }
        return observed(autoscaler=scaler, workers_wanted=None)

    assert reasons(failing("FailedGetPodsMetric", ago(seconds=119)))["Degraded"] == "False/AsExpected"
    assert reasons(failing("ScalingDisabled", ago(hours=1)))["Degraded"] == "False/AsExpected"
    seen = failing("FailedGetPodsMetric", ago(seconds=120))
    assert reasons(seen)["Degraded"] == "True/AutoscalerFailing"
    message = conditions(seen)["Degraded"]["message"]
    assert message == f"{kind} rag-worker (FailedGetPodsMetric): no metrics returned."


# --- the way to what is wanted ---


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"replicas": 5, "updatedReplicas": 1}, "True/RollingOut"),
        ({"replicas": 5, "updatedReplicas": 4}, "True/RollingOut"),
        ({"updatedReplicas": None}, "True/RollingOut"),
        ({"observedGeneration": 0}, "True/RollingOut"),
        ({"replicas": 2, "updatedReplicas": 2}, "True/Scaling"),
        ({"replicas": 6, "updatedReplicas": 6}, "True/Scaling"),
        ({"readyReplicas": 3, "availableReplicas": 3}, "True/Starting"),
        ({}, "False/Complete"),
        (
            {
                "updatedReplicas": 1,
                "conditions": [
                    {
                        "type": "Progressing",
                        "status": "False",
                        "reason": "ProgressDeadlineExceeded",
                        "message": 'ReplicaSet "rag-worker-1" has timed out progressing.',
                    }
                ],
            },
            "False/Stalled",
        ),
    ],
    ids=[
        "one new and one old", "one old left", "none new", "not seen yet", "too few pods", "too many pods",
        "one not ready", "complete", "past its deadline",
    ],
)  # fmt: skip
def test_progress(figures, expected):
    seen = observed(deployments={"worker": deployment(**figures), "router": deployment("router", 2)})
    assert reasons(seen)["Progressing"] == expected
    assert reasons(seen)["Ready"] == "True/Serving"
    assert reasons(seen)["Degraded"] == ("True/Stalled" if "Stalled" in expected else "False/AsExpected")


# --- what the routers know ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"view_age_seconds": 5.0}, "True/Fresh"),
        ({"view_age_seconds": 5.1}, "False/Stale"),
        ({"view_age_seconds": 10.1, "workers_matching": 3}, "False/Stale"),
        ({"workers_matching": 3}, "False/Mismatch"),
        ({"workers_matching": 0, "tokenizer": TokenizerReport("failed", "no such folder")}, "False/NoTokenizer"),
        ({"workers_matching": 0, "tokenizer": TokenizerReport("loading")}, "False/NoTokenizer"),
        ({"tokenizer": TokenizerReport("loaded")}, "True/Fresh"),
        ({"workers_ready": 3, "workers_matching": 3}, "False/WorkersMissing"),
        ({"draining": True, "workers_ready": 0}, "True/Fresh"),
    ],
    ids=[
        "5 s old", "5.1 s old", "old and unmatched", "unmatched", "no tokenizer", "tokenizer loading",
        "tokenizer loaded", "worker missing", "draining",
    ],
)  # fmt: skip
def test_the_worst_router_decides(changes, expected):
    seen = observed(reports={"rag-router-a": report(), "rag-router-b": report(**changes)})
    assert reasons(seen)["CacheViewFresh"] == expected
    if expected.startswith("False"):
        assert "rag-router-b" in conditions(seen)["CacheViewFresh"]["message"]


def test_a_dead_watch_is_reported_with_its_error():
    discovery = dataclasses.replace(report().discovery, healthy=False, error="watch: 403 Forbidden")
    seen = observed(reports={"rag-router-a": report(discovery=discovery, workers_matching=0)})
    assert reasons(seen)["CacheViewFresh"] == "False/DiscoveryStale"
    assert "watch: 403 Forbidden." in conditions(seen)["CacheViewFresh"]["message"]


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ({}, "Unknown/RouterUnreachable"),
        ({"rag-router-a": report()}, "True/Fresh"),
        ({"rag-router-a": report(), "rag-router-b": "timed out"}, "Unknown/RouterUnreachable"),
        ({"rag-router-a": report(workers_matching=1), "rag-router-b": "timed out"}, "False/Mismatch"),
        ({"rag-router-gone": report(workers_matching=1), "rag-router-a": report()}, "True/Fresh"),
    ],
    ids=["none asked", "one asked", "one silent", "one silent, one unmatched", "one gone"],
)
def test_routers_that_do_not_answer(reports, expected):
    assert reasons(observed(reports=reports))["CacheViewFresh"] == expected


def test_without_routers_freshness_is_unknown():
    assert reasons(observed(pods=WORKERS))["CacheViewFresh"] == "Unknown/NoRouter"


@pytest.mark.parametrize(("seconds", "expected"), [(4, "True/Fresh"), (5, "False/WorkersMissing")])
def test_a_new_worker_has_five_seconds_to_be_known(seconds, expected):
    new = pod("rag-worker-new", since=ago(seconds=seconds))
    assert reasons(observed(pods=(*WORKERS, new, *ROUTERS)))["CacheViewFresh"] == expected


# --- their history ---


def test_the_transition_time_moves_with_the_status_alone():
    before = conditions(observed())
    previous = {"conditions": list(before.values())}
    later = NOW + timedelta(minutes=5)
    seen = observed(deployments={"worker": deployment(readyReplicas=3), "router": deployment("router", 2)})
    after = conditions(seen, previous, later)
    assert after["WorkersAvailable"]["reason"] == "SomeReady"
    assert after["WorkersAvailable"]["lastTransitionTime"] == before["Ready"]["lastTransitionTime"]
    gone = observed(deployments={"worker": deployment(readyReplicas=0), "router": deployment("router", 2)})
    assert conditions(gone, previous, later)["Ready"]["lastTransitionTime"] == "2026-03-01T12:05:00Z"


@pytest.mark.parametrize("component", ["worker", "router"])
@pytest.mark.parametrize(
    ("still_ready", "verdict"),
    [(True, "True/Serving"), (False, "False/NoneReady")],
    ids=["still ready", "no longer ready"],
)
def test_the_last_one_that_terminates_and_serves_counts(component: str, still_ready: bool, verdict: str) -> None:
    ending = pod(f"rag-{component}-old", ready=still_ready)
    ending["metadata"]["deletionTimestamp"] = ago(seconds=1)
    successor = pod(f"rag-{component}-new", ready=False)
    others = ROUTERS if component == "worker" else WORKERS
    seen = observed(pods=(ending, successor, *others))
    figures = deployment(component, 1, readyReplicas=0, availableReplicas=0)
    seen = dataclasses.replace(seen, deployments={**seen.deployments, component: figures})
    assert reasons(seen)["Ready"] == verdict
    if still_ready:
        assert f"The last {component} terminates and still serves" in conditions(seen)["Ready"]["message"]
