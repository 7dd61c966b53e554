"""Access: the routers' rights at the API server (RBAC), and who may open connections to the pods (NetworkPolicy)."""

from __future__ import annotations

from controller.api.model import EngineType
from controller.objects.names import (
    APP,
    COMPONENT_LABEL,
    ENVOY_PORT,
    FEED_PORT,
    MANAGEMENT_PORT,
    NAME_LABEL,
    PICKER_PORT,
    ROUTER_PORT,
    WORKER_PORT,
    Cluster,
    Component,
    Object,
)

OBJECTIVE_GROUPS = ("llm-d.ai", "inference.networking.x-k8s.io")
"""API groups that InferenceObjectives may be in."""


def build_router_rbac(cluster: Cluster) -> tuple[Object, ...]:
    """ServiceAccount, Role and RoleBinding: what a router may list and watch in its namespace, and nothing else. That
    is EndpointSlices; with a pool its objectives, too; with somebody else's also that pool and its pods."""
    name = cluster.object_name(Component.ROUTER)
    account = cluster.new_object("v1", "ServiceAccount", Component.ROUTER)
    role = cluster.new_object("rbac.authorization.k8s.io/v1", "Role", Component.ROUTER)
    binding = cluster.new_object("rbac.authorization.k8s.io/v1", "RoleBinding", Component.ROUTER)
    return (
        {**account, "automountServiceAccountToken": False},
        {
            **role,
            "rules": _router_rules(cluster),
        },
        {
            **binding,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": cluster.namespace}],
        },
    )


def _router_rules(cluster: Cluster) -> list[Object]:
    gateway = cluster.spec.gateway
    followed: dict[tuple[str, ...], str] = {("discovery.k8s.io",): "endpointslices"}
    if gateway.picks:
        # An objective may select pools by their labels.
        followed |= {OBJECTIVE_GROUPS: "inferenceobjectives", ("inference.networking.k8s.io",): "inferencepools"}
    if gateway.inference_pool_ref is not None:
        followed[("",)] = "pods"
    return [
        {"apiGroups": list(groups), "resources": [resource], "verbs": ["list", "watch"]}
        for groups, resource in followed.items()
    ]


def build_network_policies(cluster: Cluster) -> tuple[Object, ...]:
    """NetworkPolicies, where the spec asks for them. Workers accept connections from routers and scrapers only, the
    routers' management port from the controller, scrapers and the other routers, whose live page shows all routers."""
    if not cluster.spec.network_policy.enabled:
        return ()
    policy = cluster.spec.network_policy
    worker_ports = [WORKER_PORT, *([FEED_PORT] if cluster.spec.engine.type is EngineType.VLLM else [])]
    routers = {"podSelector": {"matchLabels": cluster.selector(Component.ROUTER)}}
    management = _ingress([*_controller_peers(cluster), routers, *policy.scrapers], MANAGEMENT_PORT)
    router, gateway = cluster.spec.router, cluster.spec.gateway.picks
    stats = [_ingress(policy.scrapers, ENVOY_PORT)] if router.is_behind_envoy and router.envoy.stats else []
    data = _from_clients(cluster, ROUTER_PORT, *([PICKER_PORT] if gateway else []))
    # A gateway sends requests to the workers themselves.
    direct = [_from_clients(cluster, WORKER_PORT)] if gateway else []
    workers = _build_policy(cluster, Component.WORKER, [_ingress([routers, *policy.scrapers], *worker_ports), *direct])
    return (
        *(() if cluster.spec.is_external else (workers,)),
        _build_policy(cluster, Component.ROUTER, [data, management, *(stats if policy.scrapers else ())]),
    )


def _from_clients(cluster: Cluster, *ports: int) -> Object:
    """From those that may send requests: everyone, where the spec names nobody."""
    clients = cluster.spec.network_policy.clients
    return _ingress(clients, *ports) if clients else {"ports": _ports(*ports)}


def _controller_peers(cluster: Cluster) -> list[Object]:
    if cluster.release.namespace is None:
        return []
    return [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": cluster.release.namespace}},
            "podSelector": {"matchLabels": {NAME_LABEL: APP, COMPONENT_LABEL: "controller"}},
        }
    ]


def _build_policy(cluster: Cluster, component: Component, ingress: list[Object]) -> Object:
    return {
        **cluster.new_object("networking.k8s.io/v1", "NetworkPolicy", component),
        "spec": {
            "podSelector": {"matchLabels": cluster.selector(component)},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    }


def _ingress(peers: list[Object], *ports: int) -> Object:
    return {"from": peers, "ports": _ports(*ports)}


def _ports(*ports: int) -> list[Object]:
    return [{"port": port, "protocol": "TCP"} for port in ports]
