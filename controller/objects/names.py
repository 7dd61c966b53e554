"""Names, labels and ports of a cluster's objects."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from controller.api.model import KVClusterSpec


class Component(StrEnum):
    """The two kinds of pods that a KVCluster has: the value of the label `app.kubernetes.io/component`."""

    ROUTER = "router"
    WORKER = "worker"


Object = dict[str, Any]
"""A Kubernetes object as JSON."""

APP = "kvcluster"
MANAGED_BY = "kvcluster"
FIELD_MANAGER = "kvcluster"

NAME_LABEL = "app.kubernetes.io/name"
INSTANCE_LABEL = "app.kubernetes.io/instance"
COMPONENT_LABEL = "app.kubernetes.io/component"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"

CONFIG_HASH = "kvcluster.dev/config-hash"
"""Annotation of pods: the digest of their ConfigMap's content, so that a change of the settings rolls the pods."""
APPLIED_HASH = "kvcluster.dev/applied-hash"
"""Annotation of objects: the digest of the manifest that was applied last."""

HTTP, MANAGEMENT, FEED, PICKER, ENVOY = "http", "management", "feed", "picker", "envoy"
ROUTER_PORT, MANAGEMENT_PORT, WORKER_PORT, FEED_PORT, PICKER_PORT, ENVOY_PORT = 8000, 9000, 8100, 8101, 9002, 9901

ENVOY_IMAGE = "envoyproxy/envoy:distroless-v1.40.0"
"""The release with which everything was tested."""


@dataclass(frozen=True, slots=True)
class Release:
    """What the controller's own installation decides for all its KVClusters."""

    image: str
    """Default image of routers, emulated workers and agents."""
    image_pull_policy: str | None = None
    namespace: str | None = None
    """Namespace of the controller, whose pods may connect to the routers' management port. None: unknown."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets to pull images with, in each cluster's namespace, in addition to those that a spec names."""
    ipv6: bool = False
    """Whether this Kubernetes cluster's own addresses are of the family IPv6."""
    drain_delay: float = 5.0
    """Seconds for which a router accepts requests after SIGTERM, until the Services' proxies know that it leaves."""
    drain_limit: float = 30.0
    """Seconds for which a router or an emulated worker accepts requests after SIGTERM while no other one serves."""
    management_secret: str | None = None
    """Name of the Secret in each cluster's namespace with the tokens of the routers' management port. None: the
    operator makes one for each cluster."""
    envoy_image: str = ENVOY_IMAGE
    """Default image of the Envoys that are the routers' data plane."""
    envoy_image_pull_policy: str | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """A KVCluster: the identity of the object, its spec, and the release that runs it."""

    name: str
    namespace: str
    uid: str
    spec: KVClusterSpec
    release: Release

    def object_name(self, component: Component, suffix: str = "") -> str:
        """`rag-router`, `rag-router-management`."""
        return f"{self.name}-{component}{suffix}"

    def selector(self, component: Component) -> dict[str, str]:
        """Labels that select this cluster's pods of a component."""
        return {NAME_LABEL: APP, INSTANCE_LABEL: self.name, COMPONENT_LABEL: component.value}

    def labels(self, component: Component) -> dict[str, str]:
        """Labels of every object and pod."""
        return self.selector(component) | {MANAGED_BY_LABEL: MANAGED_BY}

    @property
    def owner(self) -> Object:
        """The owner reference that has the garbage collector delete an object with its KVCluster."""
        return {
            "apiVersion": "kvcluster.dev/v1alpha1",
            "kind": "KVCluster",
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }

    def new_object(self, api_version: str, kind: str, component: Component, suffix: str = "") -> Object:
        """A new object with nothing but apiVersion, kind and metadata."""
        return {
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {
                "name": self.object_name(component, suffix),
                "namespace": self.namespace,
                "labels": self.labels(component),
                "ownerReferences": [self.owner],
            },
        }
