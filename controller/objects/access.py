"""Who may do what: the routers' rights at the API server, and who may open connections to the pods."""

from __future__ import annotations

from controller.api.model import EngineType
from controller.objects.names import (
    APP,
    COMPONENT_LABEL,
    FEED_PORT,
    MANAGEMENT_PORT,
    NAME_LABEL,
    ROUTER_PORT,
    WORKER_PORT,
    Cluster,
    Component,
    Object,
)


def router_rights(cluster: Cluster) -> tuple[Object, ...]:
    """ServiceAccount, Role and RoleBinding: a router lists and watches its namespace's EndpointSlices, nothing else."""
    name = cluster.object_name(Component.ROUTER)
    account = cluster.head("v1", "ServiceAccount", Component.ROUTER)
    role = cluster.head("rbac.authorization.k8s.io/v1", "Role", Component.ROUTER)
    binding = cluster.head("rbac.authorization.k8s.io/v1", "RoleBinding", Component.ROUTER)
    return (
        {**account, "automountServiceAccountToken": False},
        {
            **role,
            "rules": [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}],
        },
        {
            **binding,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": cluster.namespace}],
        },
    )


def network_policies(cluster: Cluster) -> tuple[Object, ...]:
    """Workers hear routers and scrapers only; the routers' management port hears the controller and scrapers only."""
    if not cluster.spec.network_policy.enabled:
        return ()
    policy = cluster.spec.network_policy
    worker_ports = [WORKER_PORT, *([FEED_PORT] if cluster.spec.engine.type is EngineType.VLLM else [])]
    routers = {"podSelector": {"matchLabels": cluster.selector(Component.ROUTER)}}
    managers = [*_controller(cluster), *policy.scrapers]
    # An empty `from` lets everyone in: where nobody is meant, the rule itself is left out.
    management = [_ingress(managers, MANAGEMENT_PORT)] if managers else []
    data = _ingress(policy.clients, ROUTER_PORT) if policy.clients else {"ports": _ports(ROUTER_PORT)}
    return (
        _policy(cluster, Component.WORKER, [_ingress([routers, *policy.scrapers], *worker_ports)]),
        _policy(cluster, Component.ROUTER, [data, *management]),
    )


def _controller(cluster: Cluster) -> list[Object]:
    if cluster.release.namespace is None:
        return []
    return [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": cluster.release.namespace}},
            "podSelector": {"matchLabels": {NAME_LABEL: APP, COMPONENT_LABEL: "controller"}},
        }
    ]


def _policy(cluster: Cluster, component: Component, ingress: list[Object]) -> Object:
    return {
        **cluster.head("networking.k8s.io/v1", "NetworkPolicy", component),
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
