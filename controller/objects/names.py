"""Names, labels and ports of a cluster's objects, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from controller.api.model import KVClusterSpec


class Component(StrEnum):
    """Value of the label `app.kubernetes.io/component`."""

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
"""Annotation of pods: digest of their ConfigMap's content. A change of it rolls them."""
APPLIED_HASH = "kvcluster.dev/applied-hash"
"""Annotation of objects: digest of the manifest that was applied last."""

HTTP, MANAGEMENT, FEED = "http", "management", "feed"
ROUTER_PORT, MANAGEMENT_PORT, WORKER_PORT, FEED_PORT = 8000, 9000, 8100, 8101


@dataclass(frozen=True, slots=True)
class Release:
    """What the controller's own installation decides for the clusters it looks after."""

    image: str
    """Default image of routers, emulated workers and cache agents."""
    image_pull_policy: str | None = None
    namespace: str | None = None
    """Where the controller runs: its pods may ask the routers' management port. None: unknown."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets to pull images with, in each cluster's namespace; those that a spec names come on top."""
    ipv6: bool = False
    """Whether IPv6 is the family of this Kubernetes cluster's own addresses."""
    drain_delay: float = 5.0
    """Seconds a router goes on accepting after SIGTERM, for the Services' proxies to learn that it leaves."""
    drain_limit: float = 30.0
    """Seconds a router or an emulated worker goes on accepting after SIGTERM while it is the last of its kind."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A KVCluster object: who it is and what it asks for."""

    name: str
    namespace: str
    uid: str
    spec: KVClusterSpec
    release: Release

    def object_name(self, component: Component, suffix: str = "") -> str:
        """`rag-router`, `rag-router-management`."""
        return f"{self.name}-{component}{suffix}"

    def selector(self, component: Component) -> dict[str, str]:
        """Labels that name this cluster's pods of a component."""
        return {NAME_LABEL: APP, INSTANCE_LABEL: self.name, COMPONENT_LABEL: component.value}

    def labels(self, component: Component) -> dict[str, str]:
        """Labels of every object and pod."""
        return self.selector(component) | {MANAGED_BY_LABEL: MANAGED_BY}

    @property
    def owner(self) -> Object:
        """What makes an object go with its KVCluster."""
        return {
            "apiVersion": "kvcluster.dev/v1alpha1",
            "kind": "KVCluster",
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }

    def head(self, api_version: str, kind: str, component: Component, suffix: str = "") -> Object:
        """apiVersion, kind and metadata of an object."""
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
