"""What a container of the fake node finds in its environment, and where its processes listen."""

from __future__ import annotations

import base64

import pytest

from tests.kube.kubelet.environment import (
    ConfigError,
    command_line,
    container_env,
    data_of,
    expand,
    inherited,
    local_command,
    references,
)

POD = {
    "metadata": {
        "name": "rag-worker-1",
        "namespace": "prod",
        "uid": "u-1",
        "labels": {"app.kubernetes.io/instance": "rag"},
    },
    "spec": {"nodeName": "node-1"},
    "status": {"podIP": "127.9.0.1", "hostIP": "127.9.255.254"},
}
DATA = {("ConfigMap", "rag"): {"WORKER_BLOCKS": "9", "A": "from map"}, ("Secret", "keys"): {"TOKEN": "s3"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)-$(B)", "1-2"),
        ("$(MISSING)", "$(MISSING)"),
        ("$$(A)", "$(A)"),
        ("$A $() $", "$A $() $"),
        ("$(A", "$(A"),
    ],
)
def test_references_are_replaced_as_the_kubelet_does(text, expected):
    assert expand(text, {"A": "1", "B": "2"}) == expected


def test_env_overrides_and_refers_to_what_came_before():
    container = {
        "envFrom": [{"configMapRef": {"name": "rag"}}, {"secretRef": {"name": "keys"}, "prefix": "API_"}],
        "env": [
            {"name": "A", "value": "own"},
            {"name": "B", "value": "$(A) $(API_TOKEN) $(C)"},
            {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "rag", "key": "WORKER_BLOCKS"}}},
        ],
    }
    assert container_env(container, POD, DATA) == {
        "WORKER_BLOCKS": "9",
        "A": "own",
        "API_TOKEN": "s3",
        "B": "own s3 $(C)",
        "C": "9",
    }
    assert references(container) == {("ConfigMap", "rag"), ("Secret", "keys")}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metadata.name", "rag-worker-1"),
        ("metadata.namespace", "prod"),
        ("metadata.uid", "u-1"),
        ("metadata.labels['app.kubernetes.io/instance']", "rag"),
        ("metadata.annotations['none']", ""),
        ("status.podIP", "127.9.0.1"),
        ("status.hostIP", "127.9.255.254"),
        ("spec.nodeName", "node-1"),
        ("spec.serviceAccountName", "default"),
    ],
)
def test_fields_of_the_pod(path, expected):
    container = {"env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}}]}
    assert container_env(container, POD, {}) == {"X": expected}


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({"envFrom": [{"configMapRef": {"name": "gone"}}]}, 'configmap "gone" not found'),
        ({"envFrom": [{"secretRef": {"name": "gone"}}]}, 'secret "gone" not found'),
        (
            {"env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "rag", "key": "no"}}}]},
            "couldn't find key no in ConfigMap prod/rag",
        ),
        ({"env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "spec.hostNetwork"}}}]}, "no field"),
        ({"env": [{"name": "X", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}]}, "resourceFieldRef"),
    ],
)
def test_what_is_missing_is_named(container, message):
    with pytest.raises(ConfigError, match=message):
        container_env(container, POD, DATA)


def test_what_is_optional_may_be_missing():
    gone = {"name": "gone", "optional": True}
    container = {
        "envFrom": [{"configMapRef": gone}],
        "env": [
            {"name": "X", "valueFrom": {"configMapKeyRef": {**gone, "key": "k"}}},
            {"name": "Y", "valueFrom": {"configMapKeyRef": {"name": "rag", "key": "k", "optional": True}}},
        ],
    }
    assert container_env(container, POD, DATA) == {}


def test_the_command_line():
    container = {"name": "worker", "command": ["python", "-m", "worker.main"], "args": ["--seed=$(SEED)"]}
    argv = command_line(container, {"SEED": "4"})
    assert local_command(argv, "/here/python") == ["/here/python", "-m", "worker.main", "--seed=4"]
    with pytest.raises(ConfigError, match="worker has no command"):
        command_line({"name": "worker"}, {})


def test_nothing_of_ours_leaks_into_a_pod():
    ours = {
        "WORKER_PORT": "1",
        "ROUTING_STRATEGY": "x",
        "KUBECONFIG": "k",
        "PATH": "/bin",
        "KUBERNETES_SERVICE_HOST": "",
    }
    assert inherited(ours) == {"PATH": "/bin"}


def test_secrets_are_decoded():
    assert data_of("Secret", {"data": {"a": base64.b64encode(b"x").decode()}}) == {"a": "x"}
    assert data_of("ConfigMap", {}) == {}
