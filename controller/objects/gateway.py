"""What has a gateway ask the routers: an InferencePool of the workers, the picker's Service, a route to the pool."""

from __future__ import annotations

from controller.objects.names import PICKER, PICKER_PORT, WORKER_PORT, Cluster, Component, Object
from controller.objects.pods import ip_families

POOL_API = "inference.networking.k8s.io/v1"


def build_gateway_objects(cluster: Cluster) -> tuple[Object, ...]:
    """The picker's Service, the InferencePool and the HTTPRoute, as far as the spec asks for them."""
    wanted = cluster.spec.gateway
    if not wanted.picks:
        return ()
    pools = (_build_pool(cluster),) if wanted.inference_pool else ()
    return (_build_picker_service(cluster), *pools, *_build_route(cluster))


def pool_name(cluster: Cluster) -> str:
    """Name of the InferencePool of the workers: the operator's own, or the one that somebody else owns."""
    reference = cluster.spec.gateway.inference_pool_ref
    return cluster.object_name(Component.WORKER) if reference is None else reference.name


def _build_picker_service(cluster: Cluster) -> Object:
    port = {
        "name": PICKER,
        "port": PICKER_PORT,
        "targetPort": PICKER,
        "protocol": "TCP",
        # gRPC over TLS: without it some gateways would speak HTTP/1.1.
        "appProtocol": "http2",
    }
    return {
        **cluster.new_object("v1", "Service", Component.ROUTER, f"-{PICKER}"),
        "spec": {"selector": cluster.selector(Component.ROUTER), "ports": [port], **ip_families(cluster)},
    }


def _build_pool(cluster: Cluster) -> Object:
    pods = cluster.spec.engine.external
    labels, ports = (
        (cluster.selector(Component.WORKER), [WORKER_PORT])
        if pods is None
        else (
            pods.selector.match_labels,
            pods.ports,
        )
    )
    picker = {
        "group": "",
        "kind": "Service",
        "name": cluster.object_name(Component.ROUTER, f"-{PICKER}"),
        "port": {"number": PICKER_PORT},
        "failureMode": cluster.spec.gateway.failure_mode,
    }
    return {
        **cluster.new_object(POOL_API, "InferencePool", Component.WORKER),
        "spec": {
            "selector": {"matchLabels": labels},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": picker,
        },
    }


def _build_route(cluster: Cluster) -> tuple[Object, ...]:
    parents = cluster.spec.gateway.parent_refs
    if not parents:
        return ()
    pool = {
        "group": POOL_API.partition("/")[0],
        "kind": "InferencePool",
        "name": pool_name(cluster),
    }
    rule = {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": [pool]}
    route = cluster.new_object("gateway.networking.k8s.io/v1", "HTTPRoute", Component.ROUTER, "-gateway")
    return ({**route, "spec": {"parentRefs": parents, "rules": [rule]}},)
