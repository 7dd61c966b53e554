"""Who a container's process is, what it gets, and what the fake node refuses: Kubernetes' rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kube.kubelet import Isolation
from tests.kube.kubelet.environment import ConfigError
from tests.kube.kubelet.images import known
from tests.kube.kubelet.pod import unplayed
from tests.kube.kubelet.process import TOKEN_MOUNT, User, launch, token_is_mounted, user
from tests.kube.kubelet.volumes import mounts_of

METADATA = {"name": "p", "namespace": "prod", "uid": "u"}


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": METADATA, "spec": {"containers": [{"name": "c"}], **spec}}


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
        ({}, {}, 0, User(0, 0, (0,))),
        ({}, {}, 65532, User(65532, 0, (0,))),
        ({"runAsUser": 1000}, {}, 65532, User(1000, 0, (0,))),
        ({"runAsUser": 1000}, {"runAsUser": 7, "runAsGroup": 8}, 0, User(7, 8, (8,))),
        ({"fsGroup": 9, "supplementalGroups": [3]}, {"runAsNonRoot": True}, 5, User(5, 0, (0, 3, 9))),
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


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"hostNetwork": True}, ["spec.hostNetwork"]),
        ({"hostNetwork": False, "nodeSelector": {"a": "b"}}, []),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, ["spec.volumes[v].hostPath"]),
        ({"volumes": [{"name": "v", "configMap": {"name": "c", "items": [1]}}]}, ["spec.volumes[v].configMap.items"]),
        ({"securityContext": {"sysctls": [1]}}, ["spec.securityContext.sysctls"]),
        ({"containers": [{"name": "c", "workingDir": "/"}]}, ["spec.containers[c].workingDir"]),
        (
            {"initContainers": [{"name": "c", "securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}}]},
            ["spec.initContainers[c].securityContext.capabilities.add"],
        ),
        (
            {"containers": [{"name": "c", "lifecycle": {"postStart": {"x": 1}}}]},
            ["spec.containers[c].lifecycle.postStart"],
        ),
        (
            {"containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/", "subPath": "x"}]}]},
            ["spec.containers[c].volumeMounts[v].subPath"],
        ),
    ],
)
def test_what_is_not_played_is_named(spec, expected):
    assert unplayed(pod(**spec)) == expected
