"""The whole status: its figures, its schema, where clients reach the cluster, and that an idle cluster writes nothing.

Not covered: the conditions one by one (test_conditions, test_pod_problems), and that a CRD accepts the status
(tests/kvcluster/explain/test_cluster).
"""

from __future__ import annotations

import itertools
import json
from datetime import datetime

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.api.model import KVClusterSpec
from controller.objects.desired import desired_objects
from controller.objects.names import Cluster, Release
from controller.status.compute import AGES, compute, hit_rate_permille, view_age
from controller.status.observed import ReconcileProblem
from controller.status.reasons import GIVEN_BY, RECONCILE_PROBLEMS, ConditionReason, ConditionType
from controller.status.schema import status_schema
from controller.status.transitions import events
from tests.controller.status.support import (
    NOW,
    ROUTERS,
    SERVICE,
    WORKERS,
    ago,
    container,
    deployment,
    observed,
    pod,
    report,
    waiting,
)

# --- the whole ---


def test_a_healthy_cluster():
    status = compute(observed(), None, NOW)
    assert len(status.pop("conditions")) == 6
    assert status == {
        "observedGeneration": 7,
        "workers": {"summary": "4/4", "wanted": 4, "replicas": 4, "ready": 4, "updated": 4, "available": 4},
        "routers": {"summary": "2/2", "wanted": 2, "replicas": 2, "ready": 2, "updated": 2, "available": 2},
        "strategy": "cache_aware",
        "endpoint": "http://rag-router.ns.svc:8000",
        "hitRate": "82.3%",
        "cache": {"hitRatePermille": 823, "viewAgeSeconds": 1},
        "selector": ",".join(
            f"app.kubernetes.io/{label}" for label in ("component=worker", "instance=rag", "name=kvcluster")
        ),
    }


def test_the_time_may_be_text_and_has_a_zone():
    assert compute(observed(), None, "2026-03-01T13:00:00+01:00") == compute(observed(), None, NOW)
    with pytest.raises(ValueError, match="no time zone"):
        compute(observed(), None, datetime(2026, 3, 1))  # noqa: DTZ001


def test_an_autoscaler_decides_how_many_are_wanted():
    seen = observed(
        workers_wanted=None, deployments={"worker": deployment(wanted=9), "router": deployment("router", 2)}
    )
    assert compute(seen, None, NOW)["workers"]["wanted"] == 9


def test_of_an_invalid_spec_the_strategy_stays_known():
    seen = observed(spec=None)
    assert "strategy" not in compute(seen, None, NOW)
    assert compute(seen, {"strategy": "round_robin"}, NOW)["strategy"] == "round_robin"


POD = st.builds(
    lambda name, ready, since, statuses, deleted, phase: (
        pod(name, ready=ready, since=since, containerStatuses=statuses, phase=phase),
        deleted,
    ),
    st.sampled_from([f"rag-{kind}-{letter}" for kind in ("worker", "router") for letter in "abc"]),
    st.booleans(),
    st.sampled_from([ago(seconds=1), ago(seconds=30), ago(hours=1), "yesterday"]),
    st.sampled_from(
        [
            [],
            waiting("ErrImagePull", "not found"),
            waiting("ImagePullBackOff", "Back-off pulling image"),
            waiting("CreateContainerError"),
            waiting("CrashLoopBackOff", restartCount=3),
            [
                container(
                    state={"running": {}}, restartCount=2, lastState={"terminated": {"finishedAt": ago(seconds=1)}}
                )
            ],
        ]
    ),
    st.booleans(),
    st.sampled_from(["Pending", "Running", "Failed"]),
)
FIGURES = st.none() | st.integers(0, 6)
CONDITION = st.sampled_from(
    [
        {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: x"},
        {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "m" * 9000},
    ]
)
DEPLOYMENT = st.none() | st.builds(
    lambda component, wanted, conditions, **figures: deployment(component, wanted, conditions=conditions, **figures),
    component=st.sampled_from(["worker", "router"]),
    wanted=st.integers(0, 6),
    conditions=st.lists(CONDITION, max_size=2),
    readyReplicas=FIGURES,
    replicas=FIGURES,
    updatedReplicas=FIGURES,
    availableReplicas=FIGURES,
    observedGeneration=st.sampled_from([0, 1, None]),
)
REPORT = st.text(max_size=10) | st.builds(
    report,
    draining=st.booleans(),
    workers_ready=st.integers(0, 4),
    workers_matching=st.integers(0, 4),
    view_age_seconds=st.none() | st.floats(0, 1000),
    prompt_tokens=st.integers(0, 10_000),
    cached_tokens=st.integers(0, 10_000),
)
NODE_PORT = {
    **SERVICE,
    "spec": {"type": "NodePort", "ports": [{"name": "http", "port": 8000, "nodePort": 31000}]},
}


def _delete(found: list[tuple[dict, bool]]) -> tuple[dict, ...]:
    for each, deleted in found:
        if deleted:
            each["metadata"]["deletionTimestamp"] = ago(seconds=3)
    return tuple({each["metadata"]["name"]: each for each, _ in found}.values())


OBSERVED = st.fixed_dictionaries(
    {
        "generation": st.integers(1, 9),
        "spec": st.sampled_from([None, observed().spec]),
        "deployments": st.fixed_dictionaries({"worker": DEPLOYMENT, "router": DEPLOYMENT}),
        "pods": st.lists(POD, max_size=6).map(_delete),
        "reports": st.dictionaries(st.sampled_from([f"rag-router-{letter}" for letter in "abc"]), REPORT),
        "problems": st.lists(
            st.builds(
                ReconcileProblem,
                st.sampled_from(RECONCILE_PROBLEMS),
                st.sampled_from(["", "Service/x"]),
                st.text(max_size=20),
            ),
            max_size=3,
        ).map(tuple),
        "service": st.sampled_from([None, SERVICE, NODE_PORT]),
        "workers_wanted": st.none() | st.integers(0, 6),
    }
).map(lambda changes: observed(**changes))
VALIDATOR = jsonschema.Draft202012Validator(status_schema())


@settings(deadline=None)
@given(OBSERVED, OBSERVED)
def test_every_status_is_valid_and_nothing_is_written_twice(first, second):
    earlier = compute(first, None, NOW)
    for seen, previous in ((first, None), (second, earlier)):
        status = compute(seen, previous, NOW)
        VALIDATOR.validate(status)
        assert compute(seen, status, NOW) == status
        assert events(status, compute(seen, status, NOW)) == ()
        # What is stored comes back through JSON without nulls; a float would not have a stable form.
        stored = json.loads(json.dumps(status), parse_float=lambda text: pytest.fail(f"a float: {text}"))
        assert stored == status
        assert None not in status.values()
        for condition in status["conditions"]:
            assert condition["reason"] in GIVEN_BY[ConditionType(condition["type"])][condition["status"]]


def test_the_schema_refuses_what_is_no_status():
    status = compute(observed(), None, NOW)
    for wrong in (
        {**status, "hitRate": 82.3},
        {**status, "workers": {"ready": -1}},
        {**status, "conditions": [{"type": "Ready"}]},
        {**status, "cache": {"hitRatePermille": 1001}},
    ):
        assert not VALIDATOR.is_valid(wrong)


def test_the_schema_is_structural_and_describes_every_field():
    def visit(schema: dict) -> None:
        assert schema["type"] in ("object", "array", "string", "integer")
        assert schema["description"]
        for child in schema.get("properties", {}).values():
            visit(child)
        if "items" in schema:
            visit(schema["items"])

    visit(status_schema())
    assert status_schema()["properties"]["conditions"]["x-kubernetes-list-map-keys"] == ["type"]
    assert set(compute(observed(), None, NOW)) == set(status_schema()["properties"]) - {"adapters", "models"}


def test_every_reason_is_given_by_a_condition():
    given = {reason for by_status in GIVEN_BY.values() for reasons in by_status.values() for reason in reasons}
    assert given == set(ConditionReason)


# --- hit rate and view age ---


def test_no_hit_rate_before_the_first_request():
    idle = report(prompt_tokens=0, cached_tokens=0)
    status = compute(observed(reports={"rag-router-a": idle}), None, NOW)
    assert "hitRate" not in status
    assert "hitRatePermille" not in status["cache"]


@pytest.mark.parametrize(
    ("cached", "previous", "expected"),
    [(823, None, 823), (827, 823, 823), (828, 823, 828), (818, 823, 818), (819, 823, 823), (0, 3, 3), (0, None, 0)],
)
def test_half_a_percentage_point_is_noise(cached, previous, expected):
    assert hit_rate_permille([report(cached_tokens=cached)], previous) == expected


def test_the_hit_rate_is_over_all_routers_and_survives_their_restart():
    assert hit_rate_permille([report(), report(prompt_tokens=3000, cached_tokens=0)], None) == 206
    assert hit_rate_permille([report(prompt_tokens=0, cached_tokens=0)], 823) == 823


@pytest.mark.parametrize(
    ("age", "previous", "expected"),
    [
        (0.0, None, 1),
        (1.1, None, 2),
        (4.0, None, 5),
        (61.0, None, 300),
        (1e6, None, 300),
        (1.4, 1, 1),
        (1.6, 1, 2),
        (0.6, 2, 2),
        (0.5, 2, 1),
        (7.4, 5, 5),
        (7.6, 5, 10),
        (9e9, 300, 300),
        (0.2, 300, 1),
        (3.0, 4, 5),
        (None, 5, None),
    ],
)
def test_the_view_age_moves_in_steps(age, previous, expected):
    assert view_age([report(view_age_seconds=age)], previous) == expected


@settings(deadline=None)
@given(st.lists(st.floats(0, 1.2), min_size=5), st.sampled_from([None, *AGES]))
def test_an_idle_clusters_view_age_comes_to_rest(ages, previous):
    seen = []
    for age in ages:
        previous = view_age([report(view_age_seconds=age)], previous)
        seen.append(previous)
    changes = sum(before != after for before, after in itertools.pairwise(seen))
    assert changes <= 2


# --- where it is reached ---


@pytest.mark.parametrize(
    ("ingress", "expected"),
    [
        ([], "http://rag-router.ns.svc:8000"),
        ([{"ip": "203.0.113.7"}], "http://203.0.113.7:8000"),
        ([{"ip": "2001:db8::7"}], "http://[2001:db8::7]:8000"),
        ([{"hostname": "lb.example", "ip": "203.0.113.7"}], "http://lb.example:8000"),
    ],
    ids=["no address yet", "IPv4", "IPv6", "host name before address"],
)
def test_the_endpoint_of_a_load_balancer(ingress, expected):
    service = {
        **SERVICE,
        "spec": {**SERVICE["spec"], "type": "LoadBalancer"},
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    assert compute(observed(service=service), None, NOW)["endpoint"] == expected


@pytest.mark.parametrize(
    ("ingress", "expected"),
    [
        ({"host": "llm.example.com"}, "http://llm.example.com"),
        ({"host": "llm.example.com", "tlsSecret": "cert", "path": "/rag"}, "https://llm.example.com/rag"),
        ({"host": "*.example.com"}, "http://rag-router.ns.svc:8000"),
        ({}, "http://rag-router.ns.svc:8000"),
    ],
    ids=["host", "TLS and path", "wildcard", "no host"],
)
def test_the_endpoint_of_an_ingress(ingress, expected):
    spec = KVClusterSpec.model_validate({"router": {"ingress": ingress}})
    cluster = Cluster("rag", "ns", "u1", spec, Release("i"))
    (made,) = [item for item in desired_objects(cluster) if item["kind"] == "Ingress"]
    assert compute(observed(service=SERVICE, spec=spec, ingress=made), None, NOW)["endpoint"] == expected
    wanted = compute(observed(service=SERVICE, spec=spec), None, NOW)
    assert wanted["endpoint"] == "http://rag-router.ns.svc:8000", "an Ingress that is not there leads nowhere"


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ({}, "https://rag-router.ns.svc:8000"),
        ({"type": "LoadBalancer"}, "https://203.0.113.7:8000"),
        ({"type": "NodePort"}, "https://10.0.0.2:31000"),
    ],
    ids=["in the cluster", "load balancer", "node port"],
)
def test_the_endpoint_of_routers_that_speak_https(service, expected):
    """What is made for the spec, as an API server completes it."""
    spec = KVClusterSpec.model_validate({"router": {"tls": {"secretRef": {"name": "cert"}}, "service": service}})
    cluster = Cluster("rag", "ns", "u1", spec, Release("i"))
    (made,) = [
        each
        for each in desired_objects(cluster)
        if each["metadata"]["name"] == "rag-router" and each["kind"] == "Service"
    ]
    (port,) = made["spec"]["ports"]
    completed = {**made["spec"], "ports": [{**port, "nodePort": 31000}]}
    balancer = {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}}
    routers = [pod("rag-router-a", hostIP="10.0.0.2")]
    seen = observed(service={**made, "spec": completed, "status": balancer}, spec=spec, pods=(*WORKERS, *routers))
    assert compute(seen, None, NOW)["endpoint"] == expected


def test_the_endpoint_of_a_node_port_stays_while_a_router_is_on_the_node():
    def on(*hosts: str):
        routers = [pod(f"rag-router-{host}", hostIP=host) for host in hosts]
        return observed(pods=(*WORKERS, *routers), service=NODE_PORT)

    assert compute(observed(service=NODE_PORT), None, NOW)["endpoint"] == "http://rag-router.ns.svc:8000"
    status = compute(on("10.0.0.2", "10.0.0.3"), None, NOW)
    assert status["endpoint"] == "http://10.0.0.2:31000"
    assert compute(on("10.0.0.1", "10.0.0.2"), status, NOW)["endpoint"] == "http://10.0.0.2:31000"
    assert compute(on("10.0.0.1"), status, NOW)["endpoint"] == "http://10.0.0.1:31000"


def test_only_routers_that_are_ready_count():
    unready = pod("rag-router-b", ready=False)
    seen = observed(
        pods=(*WORKERS, ROUTERS[0], unready),
        reports={"rag-router-a": report(), "rag-router-b": report(cached_tokens=0, view_age_seconds=50.0)},
    )
    assert compute(seen, None, NOW)["cache"] == {"hitRatePermille": 823, "viewAgeSeconds": 1}
