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
    local_command,
    references,
    service_env,
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


def test_services_are_named_by_variables_as_the_kubelet_names_them():
    ports = [{"name": "http", "port": 8000}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    service = {"metadata": {"name": "rag-router"}, "spec": {"ports": ports}}
    headless = {"metadata": {"name": "rag-worker"}, "spec": {"ports": ports, "clusterIP": "None"}}
    assert service_env([service, headless], lambda _: "10.0.0.7") == {
        "RAG_ROUTER_SERVICE_HOST": "10.0.0.7",
        "RAG_ROUTER_SERVICE_PORT": "8000",
        "RAG_ROUTER_SERVICE_PORT_HTTP": "8000",
        "RAG_ROUTER_SERVICE_PORT_DNS": "53",
        "RAG_ROUTER_PORT": "tcp://10.0.0.7:8000",
        "RAG_ROUTER_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "RAG_ROUTER_PORT_8000_TCP_PROTO": "tcp",
        "RAG_ROUTER_PORT_8000_TCP_PORT": "8000",
        "RAG_ROUTER_PORT_8000_TCP_ADDR": "10.0.0.7",
        "RAG_ROUTER_PORT_53_UDP": "udp://10.0.0.7:53",
        "RAG_ROUTER_PORT_53_UDP_PROTO": "udp",
        "RAG_ROUTER_PORT_53_UDP_PORT": "53",
        "RAG_ROUTER_PORT_53_UDP_ADDR": "10.0.0.7",
    }


def test_secrets_are_decoded():
    assert data_of("Secret", {"data": {"a": base64.b64encode(b"x").decode()}}) == {"a": "x"}
    assert data_of("ConfigMap", {}) == {}
