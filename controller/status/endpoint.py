"""Where clients reach the OpenAI API of a cluster."""

from __future__ import annotations

from urllib.parse import urlsplit

from controller.component import Component
from controller.status import raw
from controller.status.observed import Observed, Raw
from controller.status.pods import active, is_ready

DATA_PORT = 8000
PORT_NAME = "http"


def endpoint(observed: Observed, previous: str) -> str | None:
    """The URL as far out as the Service reaches; None while there is no Service.

    An Ingress with a host, once there is one: that host. LoadBalancer: its address once it has one. NodePort: a node
    that a ready router is on, the same as long as one is.
    Else, and until then: the Service's name, which works inside the cluster.
    """
    service = observed.service
    if service is None:
        return None
    if (entrance := _entrance(observed.ingress)) is not None:
        return entrance
    ports = raw.objects(service, "spec", "ports")
    port = next((item for item in ports if item.get("name") == PORT_NAME), ports[0] if ports else {})
    number = raw.number(port, "port") or DATA_PORT
    kind = raw.text(service, "spec", "type")
    if kind == "LoadBalancer":
        for ingress in raw.objects(service, "status", "loadBalancer", "ingress"):
            host = raw.text(ingress, "hostname") or raw.text(ingress, "ip")
            if host:
                return _url(host, number)
    if kind == "NodePort" and (node_port := raw.number(port, "nodePort")):
        routers = [pod for pod in active(observed.pods, Component.ROUTER) if is_ready(pod)]
        hosts = sorted({host for pod in routers if (host := raw.text(pod, "status", "hostIP"))})
        if hosts:
            before = urlsplit(previous).hostname or ""
            return _url(before if before in hosts else hosts[0], node_port)
    return _url(f"{raw.name(service)}.{observed.namespace}.svc", number)


def _entrance(ingress: Raw | None) -> str | None:
    """The URL that our Ingress, of one rule with one path, is for; None for one without a host, or with a pattern."""
    for rule in raw.objects(ingress, "spec", "rules"):
        host = raw.text(rule, "host")
        if host and not host.startswith("*"):
            path = "".join(raw.text(each, "path") for each in raw.objects(rule, "http", "paths")[:1])
            scheme = "https" if raw.objects(ingress, "spec", "tls") else "http"
            return f"{scheme}://{host}{path.rstrip('/')}"
    return None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
