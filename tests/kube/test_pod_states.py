"""What the fake node says about pods, EndpointSlices and Deployments, and where a Service leads: pure functions.

Not covered: that the statuses come about (test_kubelet.py, test_kubelet_failures.py); sizes of rollouts
(test_rollout.py).
"""

from __future__ import annotations

import pytest

from tests.kube.kubelet.endpoints import contents
from tests.kube.kubelet.network import backends
from tests.kube.kubelet.podstatus import Place, Record, Running, Terminated, Waiting, phase, pod_status
from tests.kube.kubelet.probes import Tally
from tests.kube.kubelet.rollout import Counted, deployment_status, replica_set_status

PLACE = Place("127.9.0.1", "127.9.255.254", "2026-01-01T00:00:00Z")
NOW, LATER = "2026-01-01T00:00:05Z", "2026-01-01T00:00:09Z"
ENDED = Terminated(-9, NOW, NOW)


def record(state, *, last=None, ready=False, name="worker"):
    return Record(name, "image", state=state, last=last, ready=ready, started=ready)


@pytest.mark.parametrize(
    ("states", "terminal", "expected"),
    [
        pytest.param([record(Waiting())], False, "Pending", id="starts"),
        pytest.param([record(Running(NOW)), record(Waiting("ErrImagePull"))], False, "Pending", id="one starts"),
        pytest.param([record(Running(NOW))], False, "Running", id="runs"),
        pytest.param([record(Waiting("CrashLoopBackOff"), last=ENDED)], False, "Running", id="starts again"),
        pytest.param([record(ENDED)], False, "Running", id="has ended"),
        pytest.param([record(ENDED), record(Terminated(0, NOW, NOW))], True, "Failed", id="ended badly"),
        pytest.param([record(Terminated(0, NOW, NOW))], True, "Succeeded", id="ended well"),
    ],
)
def test_phase(states, terminal, expected):
    assert phase(states, terminal=terminal) == expected


def test_a_signal_shows_as_the_exit_code_of_a_runtime():
    assert ENDED.document()["terminated"]["exitCode"] == 137
    assert Terminated(3, NOW, NOW).document()["terminated"]["exitCode"] == 3
    assert Terminated(0, NOW, NOW).document()["terminated"]["reason"] == "Completed"


def conditions(status):
    return {each["type"]: each for each in status["conditions"]}


def test_conditions_keep_the_time_of_their_last_transition():
    pod = {"metadata": {}, "spec": {}, "status": {}}
    waiting = pod_status(pod, [record(Running(NOW)), record(Running(NOW), ready=True, name="agent")], PLACE, NOW)
    assert conditions(waiting)["Ready"]["status"] == "False"
    assert conditions(waiting)["Ready"]["message"] == "containers with unready status: [worker]"
    ready = pod_status({**pod, "status": waiting}, [record(Running(NOW), ready=True)], PLACE, LATER)
    assert conditions(ready)["Ready"]["status"] == "True"
    assert conditions(ready)["Ready"]["lastTransitionTime"] == LATER
    assert conditions(ready)["PodScheduled"]["lastTransitionTime"] == NOW
    assert ready["podIP"] == "127.9.0.1"


@pytest.mark.parametrize(
    ("state", "phase_", "initialized"),
    [
        pytest.param(Running(NOW), "Pending", "False", id="it runs"),
        pytest.param(ENDED, "Pending", "False", id="it has failed"),
        pytest.param(Terminated(0, NOW, NOW), "Running", "True", id="it has ended well"),
    ],
)
def test_an_init_container_has_to_end_well(state, phase_, initialized):
    before = Record("init", "image", state=state, completes=True)
    found = pod_status({"metadata": {}, "spec": {}}, [record(Running(NOW))], PLACE, NOW, before=[before])
    assert (found["phase"], conditions(found)["Initialized"]["status"]) == (phase_, initialized)


SERVICE = {
    "metadata": {"name": "rag-worker", "namespace": "prod", "uid": "s-1", "labels": {"a": "b"}},
    "spec": {
        "clusterIP": "None",
        "selector": {"app": "rag"},
        "ports": [{"name": "http", "port": 80, "targetPort": "web"}],
    },
}


def pod(name, ip="127.9.0.1", *, ready=True, terminating=False, port=8100, labels=None, **status):
    metadata = {"name": name, "namespace": "prod", "uid": f"u-{name}", "labels": labels or {"app": "rag"}}
    return {
        "metadata": {**metadata, **({"deletionTimestamp": NOW} if terminating else {})},
        "spec": {"nodeName": "n", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]},
        "status": {"podIP": ip, "conditions": [{"type": "Ready", "status": str(ready)}], **status},
    }


@pytest.mark.parametrize(
    ("ready", "terminating", "publish", "expected"),
    [
        pytest.param(True, False, False, (True, True, False), id="ready"),
        pytest.param(False, False, False, (False, False, False), id="not ready"),
        pytest.param(True, True, False, (False, True, True), id="ending"),
        pytest.param(False, True, False, (False, False, True), id="ending, not ready"),
        pytest.param(False, False, True, (True, False, False), id="published"),
        pytest.param(True, True, True, (True, True, True), id="published, ending"),
    ],
)
def test_conditions_of_an_endpoint(ready, terminating, publish, expected):
    service = {**SERVICE, "spec": {**SERVICE["spec"], "publishNotReadyAddresses": publish}}
    (content,) = contents(service, [pod("a", ready=ready, terminating=terminating)])
    (endpoint,) = content.endpoints
    assert tuple(endpoint["conditions"][name] for name in ("ready", "serving", "terminating")) == expected
    assert endpoint["targetRef"] == {"kind": "Pod", "namespace": "prod", "name": "a", "uid": "u-a"}
    assert content.ports == [{"name": "http", "port": 8100, "protocol": "TCP"}]


def test_pods_without_an_address_or_of_others_or_over_are_left_out():
    pods = [pod("a", ip=""), pod("b", labels={"app": "x"}), pod("c", phase="Failed")]
    (content,) = contents(SERVICE, pods)
    assert (content.ports, content.endpoints) == ([], [])


def test_pods_whose_named_ports_differ_go_into_slices_of_their_own():
    slices = contents(SERVICE, [pod("a"), pod("b", port=9), pod("c")])
    assert [[each["targetRef"]["name"] for each in content.endpoints] for content in slices] == [["a", "c"], ["b"]]
    assert [content.ports[0]["port"] for content in slices] == [8100, 9]


def test_a_service_leads_to_ready_pods_and_to_ending_ones_only_when_there_is_no_other():
    def leads_to(*pods):
        content = contents(SERVICE, pods)[0]
        return backends([{"ports": content.ports, "endpoints": content.endpoints}], "http")

    ready, ending = pod("a", "127.9.0.1"), pod("b", "127.9.0.2", terminating=True)
    unready = pod("c", "127.9.0.3", ready=False)
    assert leads_to(ready, ending, unready) == (("127.9.0.1", 8100),)
    assert leads_to(ending, unready) == (("127.9.0.2", 8100),)
    assert leads_to(unready) == ()


def test_a_probe_changes_its_verdict_after_a_threshold_of_equal_answers():
    tally = Tally(success_threshold=1, failure_threshold=3)
    assert [tally.add(answer) for answer in (True, False, False, True, False, False, False, False)] == [
        *(True, False, False, False),
        *(False, False, True, False),
    ]
    assert tally.verdict is False


def deployment(status=None):
    strategy = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return {"metadata": {"generation": 3}, "spec": {"replicas": 2, "strategy": strategy}, "status": status or {}}


def status_of(item, new, old=(), **facts):
    return deployment_status(item, new, old, **{"created": False, "failure": "", "overdue": False, "now": NOW, **facts})


def reasons(status):
    return {each["type"]: (each["status"], each["reason"]) for each in status["conditions"]}


def test_a_deployment_from_its_first_pod_to_its_last():
    fresh = status_of(deployment(), Counted(2, 2, 0, "rs"), created=True)
    assert fresh["observedGeneration"] == 3
    assert reasons(fresh) == {
        "Available": ("False", "MinimumReplicasUnavailable"),
        "Progressing": ("True", "NewReplicaSetCreated"),
    }
    half = status_of(deployment(fresh), Counted(2, 2, 1, "rs"))
    assert reasons(half)["Progressing"] == ("True", "ReplicaSetUpdated")
    assert half["unavailableReplicas"] == 1
    whole = status_of(deployment(half), Counted(2, 2, 2, "rs"))
    assert reasons(whole) == {
        "Available": ("True", "MinimumReplicasAvailable"),
        "Progressing": ("True", "NewReplicaSetAvailable"),
    }
    # A pod that dies later is no lack of progress.
    assert reasons(status_of(deployment(whole), Counted(2, 2, 1, "rs")))["Progressing"][1] == "NewReplicaSetAvailable"


def test_a_rollout_that_makes_no_progress():
    done = status_of(deployment(), Counted(2, 2, 2, "rs1"))
    begun = status_of(deployment(done), Counted(1, 1, 0, "rs2"), [Counted(2, 2, 2, "rs1")], created=True)
    assert reasons(begun)["Progressing"] == ("True", "NewReplicaSetCreated")
    stuck = status_of(deployment(begun), Counted(1, 1, 0, "rs2"), [Counted(2, 2, 2, "rs1")], overdue=True)
    assert reasons(stuck)["Progressing"] == ("False", "ProgressDeadlineExceeded")
    assert reasons(stuck)["Available"][0] == "True"
    assert (stuck["replicas"], stuck["updatedReplicas"], stuck["unavailableReplicas"]) == (3, 1, 1)


def test_pods_that_cannot_be_created():
    failed = status_of(deployment(), Counted(2, 0, 0, "rs"), failure="exceeded quota")
    assert reasons(failed)["ReplicaFailure"] == ("True", "FailedCreate")
    assert "ReplicaFailure" not in reasons(status_of(deployment(failed), Counted(2, 2, 0, "rs")))
    own = replica_set_status({"metadata": {}}, Counted(2, 0, 0, "rs"), "exceeded quota", NOW)
    assert own["conditions"][0]["message"] == "exceeded quota"
