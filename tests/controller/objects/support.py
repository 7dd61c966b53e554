"""Specs, and the objects that they ask for."""

from __future__ import annotations

from typing import Any

from controller.api.load import validate_manifest
from controller.objects.desired import desired_objects
from controller.objects.names import Cluster, Object, Release

VLLM = {
    "model": {"name": "meta-llama/Llama-3.1-8B", "profile": "llama-3.1-8b-h100-80gb"},
    "engine": {
        "type": "vllm",
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "t"}}}],
    },
    "workers": {
        "replicas": 3,
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "runtimeClassName": "nvidia",
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
        "volumeMounts": [{"name": "shm", "mountPath": "/weights"}],
    },
}
EVERYTHING: dict[str, Any] = {
    "engine": {"args": ["--dev-mode"], "env": [{"name": "A", "value": "b"}], "imagePullSecrets": ["registry"]},
    "workers": {
        "resources": {"requests": {"cpu": "500m", "memory": "256Mi"}},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"},
        ],
        "podMetadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
        "priorityClassName": "high",
    },
    "router": {
        "replicas": 2,
        "service": {"type": "LoadBalancer", "annotations": {"lb": "internal"}, "loadBalancerClass": "example.com/lb"},
        "ingress": {"host": "llm.example.com", "className": "nginx", "tlsSecret": "cert", "annotations": {"a": "b"}},
        "tls": {"secretRef": {"name": "cert"}, "clientCASecretRef": {"name": "clients", "key": "roots.pem"}},
        "httpRoute": {"parentRefs": [{"name": "gateway"}], "hostnames": ["llm.example.com"], "path": "/rag"},
    },
    "network": {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6", "IPv4"]},
    "autoscaling": {"min": 2, "max": 4, "targetQueue": 3},
    "monitoring": {"podMonitor": True, "podMonitorLabels": {"release": "prom"}, "scrapeAnnotations": True},
    "networkPolicy": {"enabled": True, "scrapers": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
}
SPECS = {"default": {}, "vllm": VLLM, "everything": EVERYTHING, "vllm and everything": {**EVERYTHING, **VLLM}}


def objects(name: str = "rag", release: Release | None = None, **spec: Any) -> dict[str, Object]:
    """`Kind/name` -> manifest."""
    content = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": name}, "spec": spec}
    parsed = validate_manifest(content).spec
    cluster = Cluster(name, "serving", "uid-1", parsed, release or Release("kvcluster:1.2.3", "Never", "system"))
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in desired_objects(cluster)}


def containers(deployment: Object) -> dict[str, Object]:
    spec = deployment["spec"]["template"]["spec"]
    return {item["name"]: item for item in (*spec["containers"], *spec.get("initContainers", ()))}
