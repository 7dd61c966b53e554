"""The kinds the controller deals with. A table instead of discovery: nothing to ask before the first request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of namespaced object. `optional`: its API exists only where someone installed it."""

    api_version: str
    name: str
    plural: str
    optional: bool = False

    @property
    def group(self) -> str:
        """API group; empty for the core."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """Version within the group."""
        return self.api_version.rpartition("/")[2]

    @property
    def api(self) -> str:
        """Path of its group and version."""
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Path of one object, of all in a namespace (no name), or of all there are (no namespace)."""
        parts = [self.api]
        if namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


KVCLUSTER = Kind("kvcluster.dev/v1alpha1", "KVCluster", "kvclusters")
POD = Kind("v1", "Pod", "pods")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
SERVICE = Kind("v1", "Service", "services")
INGRESS = Kind("networking.k8s.io/v1", "Ingress", "ingresses")
HPA = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
SCALED_OBJECT = Kind("keda.sh/v1alpha1", "ScaledObject", "scaledobjects", optional=True)
INFERENCE_POOL = Kind("inference.networking.k8s.io/v1", "InferencePool", "inferencepools", optional=True)

SECRET = Kind("v1", "Secret", "secrets")
"""Read and created by name, never watched or changed."""

OWNED = (
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    SERVICE,
    INGRESS,
    Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes", optional=True),
    INFERENCE_POOL,
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    DEPLOYMENT,
    HPA,
    SCALED_OBJECT,
    Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors", optional=True),
)
"""Kinds of the objects that a KVCluster owns."""

_BY_NAME: Mapping[tuple[str, str], Kind] = {
    (kind.api_version, kind.name): kind for kind in (*OWNED, KVCLUSTER, POD, SECRET)
}


def kind_of(manifest: Mapping[str, Any]) -> Kind:
    """The kind of this object. Raises `LookupError`."""
    return _BY_NAME[manifest["apiVersion"], manifest["kind"]]
