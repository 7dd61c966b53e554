"""All objects of a cluster, in the order in which they are applied."""

from __future__ import annotations

from controller.objects.access import build_network_policies, build_router_rbac
from controller.objects.config import build_adapters_config_map, build_config_map, digest
from controller.objects.envoy import build_envoy_config_map
from controller.objects.gateway import build_gateway_objects
from controller.objects.monitoring import build_pod_monitors
from controller.objects.names import APPLIED_HASH, Cluster, Component, Object
from controller.objects.routers import (
    build_router_deployment,
    build_router_entrances,
    build_router_management_service,
    build_router_service,
)
from controller.objects.scaling import build_autoscalers, build_disruption_budget
from controller.objects.workers import build_worker_deployments, build_worker_services


def desired_objects(cluster: Cluster) -> tuple[Object, ...]:
    """All objects that should exist for this cluster, dependencies first. Each is annotated with its own digest."""
    own = (Component.ROUTER,) if cluster.spec.is_external else tuple(Component)
    objects = (
        *build_router_rbac(cluster),
        *(build_config_map(cluster, component) for component in own),
        *build_adapters_config_map(cluster),
        *build_envoy_config_map(cluster),
        *build_network_policies(cluster),
        *build_worker_services(cluster),
        build_router_service(cluster),
        build_router_management_service(cluster),
        *(build_disruption_budget(cluster, component) for component in own),
        *build_worker_deployments(cluster),
        build_router_deployment(cluster),
        *build_router_entrances(cluster),
        *build_gateway_objects(cluster),
        *build_autoscalers(cluster),
        *build_pod_monitors(cluster),
    )
    return tuple(_stamped(manifest) for manifest in objects)


def _stamped(manifest: Object) -> Object:
    metadata = manifest["metadata"]
    annotations = metadata.get("annotations", {}) | {APPLIED_HASH: digest(manifest)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}
