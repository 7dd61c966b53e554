"""What keeps pods from running is reported with the pod's name and what to do, and only while it lasts.

Not covered: that a kubelet reports such states: the statuses here are written by hand.
"""

from __future__ import annotations

import pytest

from tests.controller.status.support import (
    ROUTERS,
    WORKERS,
    ago,
    conditions,
    container,
    observed,
    pod,
    reasons,
    waiting,
    with_unready,
)

PULL = 'rpc error: code = NotFound desc = failed to pull and unpack image "registry.example/kvcluster:9": not found'
CRASHED = {"terminated": {"exitCode": 3, "reason": "Error", "finishedAt": ago(seconds=20)}}
OOM = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": ago(seconds=20)}}
KILLED = {"terminated": {"exitCode": 139, "reason": "Error", "finishedAt": ago(seconds=20)}}
LONG_AGO = {"terminated": {"exitCode": 1, "finishedAt": ago(minutes=11)}}
UNSCHEDULABLE = [
    {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
]

PROBLEMS = {
    "pull": (
        {"containerStatuses": waiting("ErrImagePull", PULL)},
        "ImagePullFailed",
        ["Pod rag-worker-x cannot pull image registry.example/kvcluster:9: rpc error", "not found.", "Check the image"],
    ),
    "pull, from 1.31 on": (
        {
            "containerStatuses": waiting(
                "ImagePullBackOff", f'Back-off pulling image "registry.example/kvcluster:9": ErrImagePull: {PULL}'
            )
        },
        "ImagePullFailed",
        [f"image registry.example/kvcluster:9: {PULL}. Check"],
    ),
    "pull, no cause given": (
        {"containerStatuses": waiting("ImagePullBackOff", 'Back-off pulling image "registry.example/kvcluster:9"')},
        "ImagePullFailed",
        ["cannot pull image registry.example/kvcluster:9. Check"],
    ),
    "name": (
        {"containerStatuses": waiting("InvalidImageName")},
        "ImagePullFailed",
        ["cannot pull image registry.example/kvcluster:9 (InvalidImageName). Check"],
    ),
    "initial container": (
        {"initContainerStatuses": waiting("ErrImageNeverPull", "it is not present")},
        "ImagePullFailed",
        ["it is not present."],
    ),
    "config": (
        {"containerStatuses": waiting("CreateContainerConfigError", 'configmap "rag-worker" not found')},
        "CannotStart",
        ['Container worker of pod rag-worker-x cannot start (CreateContainerConfigError): configmap "rag-worker" not'],
    ),
    "crash": (
        {"containerStatuses": waiting("CrashLoopBackOff", "back-off 40s", restartCount=4, lastState=CRASHED)},
        "CrashLooping",
        [
            "Container worker of pod rag-worker-x keeps ending: last time with exit code 3.",
            "kubectl logs -n ns rag-worker-x -c worker --previous",
        ],
    ),
    "crash, between two": (
        {"containerStatuses": [container(state={"running": {}}, restartCount=2, lastState=KILLED)]},
        "CrashLooping",
        ["last time with exit code 139 (SIGSEGV)."],
    ),
    "crash, right after": (
        {"containerStatuses": [container(state=CRASHED, restartCount=1)]},
        "CrashLooping",
        ["exit code 3"],
    ),
    "memory": (
        {"containerStatuses": waiting("CrashLoopBackOff", restartCount=4, lastState=OOM)},
        "CrashLooping",
        ["OOMKilled, exit code 137", "Raise its memory limit"],
    ),
    "no node": (
        {"phase": "Pending", "conditions": UNSCHEDULABLE},
        "Unschedulable",
        ["No node takes pod rag-worker-x: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "spec.workers"],
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_of_a_pod_is_reported_with_its_name(problem):
    status, reason, words = PROBLEMS[problem]
    few, none = (with_unready(pod("rag-worker-x", ready=False, **status), ready=ready) for ready in (3, 0))
    assert reasons(few)["Degraded"] == f"True/{reason}"
    assert reasons(few)["WorkersAvailable"] == "True/SomeReady"
    assert reasons(few)["Ready"] == "True/Serving"
    assert reasons(none)["WorkersAvailable"] == reasons(none)["Ready"] == f"False/{reason}"
    for message in (
        conditions(few)["Degraded"]["message"],
        conditions(few)["WorkersAvailable"]["message"],
        conditions(none)["Ready"]["message"],
    ):
        assert all(word in message for word in words), message
        assert "rag-worker-x" in message


def test_the_kubelets_best_explanation_is_kept_while_its_messages_alternate():
    broken = {
        reason: with_unready(pod("rag-worker-x", ready=False, containerStatuses=waiting(reason, said)))
        for reason, said in (("ErrImagePull", PULL), ("ImagePullBackOff", "Back-off pulling image"))
    }
    first = conditions(broken["ErrImagePull"])
    again = conditions(broken["ImagePullBackOff"], {"conditions": list(first.values())})
    assert again == first


@pytest.mark.parametrize(
    "statuses",
    [
        pytest.param([container(state={"running": {}}, restartCount=1, lastState=CRASHED)], id="ended once"),
        pytest.param([container(state={"running": {}}, restartCount=5, lastState=LONG_AGO)], id="ended long ago"),
        pytest.param(waiting("ContainerCreating"), id="starting"),
    ],
)
def test_a_pod_that_may_still_start_is_no_problem(statuses):
    starting = pod("rag-worker-x", ready=False, containerStatuses=statuses)
    assert reasons(with_unready(starting))["Degraded"] == "False/AsExpected"


@pytest.mark.parametrize(("seconds", "expected"), [(59, "True/CrashLooping"), (60, "False/AsExpected")])
def test_a_loop_is_over_once_the_pod_has_been_ready_for_a_minute(seconds, expected):
    status = [container(state={"running": {}}, restartCount=3, lastState=CRASHED)]
    seen = observed(
        pods=(*WORKERS[:3], pod("rag-worker-x", since=ago(seconds=seconds), containerStatuses=status), *ROUTERS)
    )
    assert reasons(seen)["Degraded"] == expected
    assert reasons(seen)["WorkersAvailable"] == "True/AllReady"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ('pods "rag-worker-x" is forbidden: exceeded quota: gpus, requested: nvidia.com/gpu=1', "QuotaExceeded"),
        ('pods "rag-worker-x" is forbidden: violates PodSecurity "restricted:latest"', "CreateRefused"),
    ],
)
def test_a_refused_pod_is_reported_with_the_words_of_the_api_server(said, reason):
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": said}
    seen = with_unready(ready=1, conditions=[failure])
    assert reasons(seen)["WorkersAvailable"] == f"False/{reason}"
    assert reasons(seen)["Degraded"] == f"True/{reason}"
    assert said in conditions(seen)["Degraded"]["message"]


def test_the_gravest_comes_first_and_the_rest_is_named():
    seen = with_unready(
        pod("rag-worker-a", ready=False, phase="Pending", conditions=UNSCHEDULABLE),
        pod("rag-worker-b", ready=False, containerStatuses=waiting("ErrImagePull", PULL)),
        pod("rag-worker-c", ready=False, containerStatuses=waiting("ErrImagePull", PULL)),
        ready=1,
    )
    degraded = conditions(seen)["Degraded"]
    assert degraded["reason"] == "ImagePullFailed"
    assert degraded["message"].endswith("And 1 more. Besides: Unschedulable.")


def test_pods_that_have_ended_or_are_being_deleted_have_no_problem():
    broken = pod("rag-worker-x", ready=False, containerStatuses=waiting("ErrImagePull", PULL))
    broken["metadata"]["deletionTimestamp"] = ago(seconds=1)
    evicted = pod("rag-worker-y", ready=False, containerStatuses=waiting("ErrImagePull", PULL), phase="Failed")
    assert reasons(with_unready(broken, evicted))["Degraded"] == "False/AsExpected"
