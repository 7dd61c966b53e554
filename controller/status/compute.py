"""Computes the status of a KVCluster: its conditions, its figures, and where clients reach it.

Values that fluctuate are held still against noise, so that an idle cluster writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from controller.objects.names import APP, COMPONENT_LABEL, HTTP, INSTANCE_LABEL, NAME_LABEL, ROUTER_PORT, Component
from controller.status import adapters, raw
from controller.status.conditions import conditions
from controller.status.observed import Observed, ready_reports
from controller.status.pods import active, is_ready
from controller.status.raw import Raw
from controller.status.report import RouterReport
from controller.status.workload import workload

AGES = (1, 2, 5, 10, 30, 60, 300)
"""Values of viewAgeSeconds: the smallest that is not exceeded. 300 stands for all that is older."""
HELD_PERMILLE = 5
"""A hit rate that differs by less from the last one is not written."""


def compute(observed: Observed, previous: Mapping[str, Any] | None, now: datetime | str) -> dict[str, Any]:
    """The whole status, which replaces the last one. It equals the last one when there is nothing to write.

    `previous` is the last status, None before the first. `now` is an aware datetime, or RFC 3339.
    """
    before = previous if previous is not None else {}
    cache = cache_status(ready_reports(observed), raw.mapping(before, "cache"))
    permille = cache.get("hitRatePermille")
    status = {
        "observedGeneration": observed.generation,
        "conditions": conditions(observed, raw.objects(before, "conditions"), raw.moment(now)),
        "workers": workload(observed, Component.WORKER).figures(),
        "routers": workload(observed, Component.ROUTER).figures(),
        "strategy": _strategy(observed, before),
        "endpoint": endpoint(observed, raw.text(before, "endpoint")),
        "hitRate": None if permille is None else percent(permille),
        "cache": cache,
        "models": _models(observed) or raw.text(before, "models") or None,
        "adapters": _adapters(observed, before),
        "selector": None if observed.external else selector(observed.name),
    }
    # An API server drops nulls, and a status with them would never equal the one that is stored.
    return {name: value for name, value in status.items() if value is not None}


def selector(name: str) -> str:
    """Label selector of a cluster's worker pods, for the scale subresource."""
    labels = {COMPONENT_LABEL: Component.WORKER.value, INSTANCE_LABEL: name, NAME_LABEL: APP}
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _strategy(observed: Observed, before: Mapping[str, Any]) -> str | None:
    if observed.spec is not None:
        return observed.spec.router.strategy.value
    return raw.text(before, "strategy") or None


def _models(observed: Observed) -> str:
    """The models that the routers report, the cluster's own first; empty while none does. Routers meet workers in any
    order, so the others are sorted."""
    own = observed.spec.served_names if observed.spec is not None else []
    names = {model.name for report in ready_reports(observed) for model in report.models}
    return ", ".join(sorted(names, key=lambda name: (name not in own, name)))


def _adapters(observed: Observed, before: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`adapters` of the status; the last one while no router tells anything, or the spec is invalid."""
    if observed.spec is not None and not observed.spec.model.adapters:
        return None
    reports = ready_reports(observed)
    found = adapters.status(adapters.figures(observed.spec, reports)) if observed.spec is not None else None
    return found if found is not None else raw.mapping(before, "adapters") or None


def hit_rate_permille(reports: Iterable[RouterReport], previous: int | None) -> int | None:
    """Share of the prompt tokens that came from the caches since the routers started, in thousandths.

    None before the first request. `previous` stays while there is nothing newer: the routers have just restarted.
    """
    counts = [(report.cached_tokens, report.prompt_tokens) for report in reports]
    prompt = sum(tokens for _, tokens in counts)
    if not prompt:
        return previous
    rate = round(1000 * sum(tokens for tokens, _ in counts) / prompt)
    return previous if previous is not None and abs(rate - previous) < HELD_PERMILLE else rate


def view_age(reports: Iterable[RouterReport], previous: int | None) -> int | None:
    """Age of the oldest view that a router has of a ready worker, in seconds, as one of `AGES`; None without a view.

    Ages swing by a second between two reports of a worker. So the value moves up when it is exceeded by half, and down
    at half of the next smaller value.
    """
    ages = [report.view_age_seconds for report in reports if report.view_age_seconds is not None]
    if not ages:
        return None
    oldest = max(ages)
    if previous in AGES and previous is not None:
        below = AGES[max(0, AGES.index(previous) - 1)]
        if (oldest <= 1.5 * previous or previous == AGES[-1]) and (oldest > below / 2 or previous == AGES[0]):
            return previous
    return next((age for age in AGES if oldest <= age), AGES[-1])


def percent(permille: int) -> str:
    """`82.3%`."""
    return f"{permille // 10}.{permille % 10}%"


def cache_status(reports: Iterable[RouterReport], previous: Mapping[str, Any]) -> dict[str, Any]:
    """`cache` of the status, with what is known."""
    asked = list(reports)
    last_rate, last_age = raw.at(previous, "hitRatePermille"), raw.at(previous, "viewAgeSeconds")
    rate = hit_rate_permille(asked, last_rate if type(last_rate) is int else None)
    age = view_age(asked, last_age if type(last_age) is int else None)
    known = {"hitRatePermille": rate, "viewAgeSeconds": age}
    return {name: value for name, value in known.items() if value is not None}


def endpoint(observed: Observed, previous: str) -> str | None:
    """The base URL by which most clients reach the OpenAI API; None while there is no Service.

    The host of an Ingress, once there is one. Otherwise, by the Service's type, the load balancer's address, once it
    has one, or a node with a ready router (`previous` as long as it has one). Otherwise, and until then, the Service's
    name, which works inside the cluster.
    """
    service = observed.service
    if service is None:
        return None
    if (url := _ingress_url(observed.ingress)) is not None:
        return url
    ports = raw.objects(service, "spec", "ports")
    port = next((item for item in ports if item.get("name") == HTTP), ports[0] if ports else {})
    number = raw.number(port, "port") or ROUTER_PORT
    scheme = "https" if raw.text(port, "appProtocol") == "https" else "http"
    kind = raw.text(service, "spec", "type")
    if kind == "LoadBalancer":
        for ingress in raw.objects(service, "status", "loadBalancer", "ingress"):
            host = raw.text(ingress, "hostname") or raw.text(ingress, "ip")
            if host:
                return _url(scheme, host, number)
    if kind == "NodePort" and (node_port := raw.number(port, "nodePort")):
        routers = [pod for pod in active(observed.pods, Component.ROUTER) if is_ready(pod)]
        hosts = sorted({host for pod in routers if (host := raw.text(pod, "status", "hostIP"))})
        if hosts:
            before = urlsplit(previous).hostname or ""
            return _url(scheme, before if before in hosts else hosts[0], node_port)
    return _url(scheme, f"{raw.name(service)}.{observed.namespace}.svc", number)


def _ingress_url(ingress: Raw | None) -> str | None:
    """The URL of our Ingress, which has one rule with one path; None when it has no host, or a wildcard."""
    for rule in raw.objects(ingress, "spec", "rules"):
        host = raw.text(rule, "host")
        if host and not host.startswith("*"):
            path = "".join(raw.text(each, "path") for each in raw.objects(rule, "http", "paths")[:1])
            scheme = "https" if raw.objects(ingress, "spec", "tls") else "http"
            return f"{scheme}://{host}{path.rstrip('/')}"
    return None


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
