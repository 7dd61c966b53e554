"""All objects of a cluster, in the order in which they are applied."""

from __future__ import annotations

from controller.objects import routers, workers
from controller.objects.access import network_policies, router_rights
from controller.objects.config import config_map, digest
from controller.objects.monitoring import pod_monitors
from controller.objects.names import APPLIED_HASH, Cluster, Component, Object
from controller.objects.routers import entrances
from controller.objects.scaling import autoscalers, disruption_budget


def desired_objects(cluster: Cluster) -> tuple[Object, ...]:
    """What should exist for this cluster, what others depend on first. Each carries the digest of its content."""
    objects = (
        *router_rights(cluster),
        *(config_map(cluster, component) for component in Component),
        *network_policies(cluster),
        workers.service(cluster),
        routers.service(cluster),
        routers.management_service(cluster),
        *(disruption_budget(cluster, component) for component in Component),
        workers.deployment(cluster),
        routers.deployment(cluster),
        *entrances(cluster),
        *autoscalers(cluster),
        *pod_monitors(cluster),
    )
    return tuple(_stamped(manifest) for manifest in objects)


def _stamped(manifest: Object) -> Object:
    metadata = manifest["metadata"]
    annotations = metadata.get("annotations", {}) | {APPLIED_HASH: digest(manifest)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}
