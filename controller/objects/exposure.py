"""How clients from outside come to the routers' Service: an Ingress, a Gateway API HTTPRoute."""

from __future__ import annotations

from collections.abc import Mapping

from controller.component import Component
from controller.objects.names import HTTP, ROUTER_PORT, Cluster, Object


def entrances(cluster: Cluster) -> tuple[Object, ...]:
    """What the spec asks for of the two."""
    return (*_ingress(cluster), *_http_route(cluster))


def _ingress(cluster: Cluster) -> tuple[Object, ...]:
    wanted = cluster.spec.router.ingress
    if wanted is None:
        return ()
    service = {"name": cluster.object_name(Component.ROUTER), "port": {"name": HTTP}}
    path = {"path": wanted.path, "pathType": "Prefix", "backend": {"service": service}}
    host = {} if wanted.host is None else {"host": wanted.host}
    spec: Object = {"rules": [{**host, "http": {"paths": [path]}}]}
    if wanted.class_name is not None:
        spec["ingressClassName"] = wanted.class_name
    if wanted.tls_secret is not None:
        hosts = {} if wanted.host is None else {"hosts": [wanted.host]}
        spec["tls"] = [{**hosts, "secretName": wanted.tls_secret}]
    return ({**_annotated(cluster, "networking.k8s.io/v1", "Ingress", wanted.annotations), "spec": spec},)


def _http_route(cluster: Cluster) -> tuple[Object, ...]:
    wanted = cluster.spec.router.http_route
    if wanted is None:
        return ()
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": wanted.path}}],
        "backendRefs": [{"name": cluster.object_name(Component.ROUTER), "port": ROUTER_PORT}],
    }
    spec: Object = {"parentRefs": wanted.parent_refs, "rules": [rule]}
    if wanted.hostnames:
        spec["hostnames"] = list(wanted.hostnames)
    return ({**_annotated(cluster, "gateway.networking.k8s.io/v1", "HTTPRoute", wanted.annotations), "spec": spec},)


def _annotated(cluster: Cluster, api_version: str, kind: str, annotations: Mapping[str, str]) -> Object:
    manifest = cluster.head(api_version, kind, Component.ROUTER)
    if annotations:
        manifest["metadata"]["annotations"] = dict(annotations)
    return manifest
