"""Who a container's process is, what it gets, and what the fake node refuses: Kubernetes' rules, as functions of the
specs.

Not covered: what a process then finds (test_pod_surroundings.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kube.kubelet import Isolation
from tests.kube.kubelet.environment import ConfigError, command_line, container_env, local_command
from tests.kube.kubelet.images import known
from tests.kube.kubelet.pod import unplayed
from tests.kube.kubelet.process import TOKEN_MOUNT, User, launch, token_is_mounted, user
from tests.kube.kubelet.volumes import mounts_of

METADATA = {"name": "p", "namespace": "prod", "uid": "u"}


def pod(**spec: Any) -> dict[str, Any]:
    plain = {"enableServiceLinks": False, "containers": [{"name": "c"}]}
    return {"metadata": METADATA, "spec": {**plain, **spec}}


@pytest.mark.parametrize(
    ("in_pod", "in_account", "mounted"),
    [(None, None, True), (None, False, False), (True, False, True), (False, True, False), (None, True, True)],
)
def test_the_pod_has_the_last_word_on_its_token(in_pod, in_account, mounted):
    said = "automountServiceAccountToken"
    spec = pod(**({} if in_pod is None else {said: in_pod}))
    assert token_is_mounted(spec, {} if in_account is None else {said: in_account}) is mounted


@pytest.mark.parametrize(
    ("of_pod", "of_container", "image", "expected"),
    [
        pytest.param({}, {}, 0, User(0, 0, (0,)), id="root"),
        pytest.param({}, {}, 65532, User(65532, 0, (0,)), id="the image's"),
        pytest.param({"runAsUser": 1000}, {}, 65532, User(1000, 0, (0,)), id="the pod's"),
        pytest.param({"runAsUser": 1000}, {"runAsUser": 7, "runAsGroup": 8}, 0, User(7, 8, (8,)), id="the container's"),
        pytest.param(
            {"fsGroup": 9, "supplementalGroups": [3]}, {"runAsNonRoot": True}, 5, User(5, 0, (0, 3, 9)), id="groups"
        ),
    ],
)
def test_the_user_of_a_container(of_pod, of_container, image, expected):
    assert user(pod(securityContext=of_pod), {"name": "c", "securityContext": of_container}, image) == expected


def test_an_image_that_means_to_be_root_may_be_forbidden_to():
    with pytest.raises(ConfigError, match="image will run as root"):
        user(pod(), {"name": "c", "securityContext": {"runAsNonRoot": True}}, 0)
    with pytest.raises(ConfigError, match="breaks non-root policy"):
        user(pod(securityContext={"runAsUser": 0}), {"name": "c", "securityContext": {"runAsNonRoot": True}}, 5)


def test_our_image_is_the_dockerfiles():
    image = known("kvcluster:test")
    assert image.uid == 65532
    assert image.env["PYTHONSAFEPATH"] == "1"
    assert known("vllm/vllm-openai:v0.32.0").uid == 0


def test_what_a_container_is_denied():
    context = {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["all"]}}
    told = json.loads(launch(pod(), {"securityContext": context}, User(1, 2, (3,)), [], Isolation.FULL))
    assert {told["read_only"], told["no_new_privs"], told["drop"], told["isolate"]} == {True}
    told = json.loads(launch(pod(), {}, User(1, 2, (3,)), [], Isolation.NONE))
    assert {told["read_only"], told["no_new_privs"], told["drop"], told["isolate"]} == {False}


def test_volumes_are_mounted_where_there_is_a_folder(tmp_path):
    scratch = {"name": "tmp", "mountPath": str(tmp_path)}
    found = mounts_of({"volumeMounts": [scratch]}, {"tmp": tmp_path}, Path("/token"))
    assert [each.target for each in found] == [str(tmp_path), TOKEN_MOUNT]
    with pytest.raises(ConfigError, match="it has no /nowhere"):
        mounts_of({"volumeMounts": [{**scratch, "mountPath": "/nowhere"}]}, {"tmp": tmp_path}, None)


UNPLAYED = [
    pytest.param({"hostNetwork": True}, ["spec.hostNetwork"], id="field of the pod"),
    pytest.param({"hostNetwork": False, "nodeSelector": {"a": "b"}}, [], id="passed over"),
    pytest.param({"enableServiceLinks": True}, ["spec.enableServiceLinks: true"], id="Service links"),
    pytest.param({"restartPolicy": "Never"}, ["spec.restartPolicy: Never"], id="restart policy"),
    pytest.param({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, ["spec.volumes[v].hostPath"], id="volume"),
    pytest.param({"securityContext": {"sysctls": [1]}}, ["spec.securityContext.sysctls"], id="security of the pod"),
    pytest.param({"initContainers": [{"name": "i", "tty": True}]}, ["spec.initContainers[i].tty"], id="init"),
]
UNPLAYED_OF_A_CONTAINER = [
    pytest.param({"workingDir": "/"}, ".workingDir", id="field"),
    pytest.param({"securityContext": {"capabilities": {"add": ["X"]}}}, ".securityContext.capabilities.add", id="cap"),
    pytest.param({"lifecycle": {"postStart": {"x": 1}}}, ".lifecycle.postStart", id="postStart"),
    pytest.param({"lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}, ".lifecycle.preStop.sleep", id="sleep"),
    pytest.param({"readinessProbe": {"tcpSocket": {"port": 1}}}, ".readinessProbe.tcpSocket", id="TCP probe"),
    pytest.param({"volumeMounts": [{"name": "v", "subPath": "x"}]}, ".volumeMounts[v].subPath", id="mount"),
    pytest.param({"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"a": 1}}}]}, ".env[X].valueFrom.secretKeyRef",
                 id="key of a Secret"),
    pytest.param({"envFrom": [{"secretRef": {"name": "s"}}]}, ".envFrom[].secretRef", id="Secret"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected"), UNPLAYED)
def test_what_is_not_played_is_named(spec, expected):
    assert unplayed(pod(**spec)) == expected


@pytest.mark.parametrize(("container", "expected"), UNPLAYED_OF_A_CONTAINER)
def test_what_is_not_played_of_a_container_is_named(container, expected):
    assert unplayed(pod(containers=[{"name": "c", **container}])) == [f"spec.containers[c]{expected}"]


PLACED = {
    "metadata": {"name": "rag-worker-1", "namespace": "prod", "uid": "u-1"},
    "spec": {"nodeName": "node-1"},
    "status": {"podIP": "127.9.0.1", "hostIP": "127.9.255.254"},
}


def test_variables_come_from_config_maps_then_from_values_and_fields_of_the_pod():
    container = {
        "envFrom": [{"configMapRef": {"name": "rag"}}],
        "env": [
            {"name": "A", "value": "own"},
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
    }
    env = container_env(container, PLACED, {"rag": {"WORKER_BLOCKS": "9", "A": "from map"}})
    assert env == {"WORKER_BLOCKS": "9", "A": "own", "NAME": "rag-worker-1", "IP": "127.9.0.1"}


@pytest.mark.parametrize(
    ("container", "message"),
    [
        pytest.param({"envFrom": [{"configMapRef": {"name": "gone"}}]}, 'configmap "gone" not found', id="ConfigMap"),
        pytest.param({"env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}}]},
                     "no field", id="field"),
        pytest.param({"env": [{"name": "X", "value": "$(A)"}]}, "no references", id="reference"),
    ],
)  # fmt: skip
def test_what_is_missing_or_not_played_keeps_a_container_from_starting(container, message):
    with pytest.raises(ConfigError, match=message):
        container_env(container, PLACED, {})


def test_the_command_line():
    argv = command_line({"name": "worker", "command": ["python", "-m", "worker.main"], "args": ["--seed=4"]})
    assert local_command(argv, "/here/python") == ["/here/python", "-m", "worker.main", "--seed=4"]
    with pytest.raises(ConfigError, match="worker has no command"):
        command_line({"name": "worker"})
