"""Reads the workers behind a Service from its EndpointSlices. docs/router.md, "Discovery", says what counts and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers

HTTP_PORT = "http"
"""Name of the port that takes requests. If a slice has one port only and it has no name, that port is meant."""
FEED_PORT = "feed"
"""Name of the port of the cache feed, if another process serves it."""

FAMILIES = ("IPv4", "IPv6", "FQDN")
"""Address types, in order of preference: a pod that has addresses of several types is still one worker."""


class Endpoint(NamedTuple):
    """One address of one worker, as one slice states it."""

    family: int
    """Index into `FAMILIES`."""
    url: str
    feed: str | None
    pod: str
    uid: str
    ready: bool
    terminating: bool
    serving: bool
    """The endpoint would be ready if it were not terminating."""


Slice = tuple[Endpoint, ...]


def read_slice(found: Mapping[str, Any], port_name: str = HTTP_PORT) -> Slice:
    """The endpoints of an EndpointSlice object; empty if it has no port of this name or no address."""
    port, feed_port = _ports(found.get("ports") or (), port_name)
    family = found.get("addressType")
    if port is None or family not in FAMILIES:
        return ()
    endpoints = []
    for endpoint in found.get("endpoints") or ():
        addresses = endpoint.get("addresses") or ()
        if not addresses:
            continue
        # Further addresses have no meaning (KEP-752).
        host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
        conditions = endpoint.get("conditions") or {}
        target = endpoint.get("targetRef") or {}
        is_pod = target.get("kind") == "Pod"
        endpoints.append(
            Endpoint(
                family=FAMILIES.index(family),
                url=f"http://{host}:{port}",
                feed=None if feed_port in (None, port) else f"http://{host}:{feed_port}",
                pod=target.get("name") or "" if is_pod else "",
                uid=target.get("uid") or "" if is_pod else "",
                ready=conditions.get("ready") is not False,  # absent means ready
                terminating=conditions.get("terminating") is True,
                serving=conditions.get("serving") is True,
            )
        )
    return tuple(endpoints)


def _ports(ports: Iterable[Mapping[str, Any]], name: str) -> tuple[int | None, int | None]:
    """The numbers of the port of this name and of that for the feed."""
    named = {
        port.get("name") or "": port["port"]
        for port in ports
        if port.get("port") and (port.get("protocol") or "TCP") == "TCP"
    }
    request = named.get(name, named.get("") if len(named) == 1 else None)
    return request, named.get(FEED_PORT)


def discovered_workers(slices: Iterable[Slice]) -> DiscoveredWorkers:
    """The workers that these slices name together, whatever the order of the slices.

    A pod is one worker, and so is an address, although two slices may name it: for a moment while an endpoint moves
    from one slice to another, and always for a pod with addresses of two families.
    """
    found = [endpoint for each in slices for endpoint in each]
    leaving = {endpoint.uid for endpoint in found if endpoint.terminating and endpoint.uid}

    def intake(endpoint: Endpoint) -> Intake:
        if endpoint.terminating or endpoint.uid in leaving:
            return Intake.DRAINING if endpoint.serving else Intake.CLOSED
        return Intake.OPEN if endpoint.ready else Intake.CLOSED

    pods: dict[str, Endpoint] = {}
    for endpoint in sorted(found, key=lambda each: (each.family, intake(each), each[1:], each.feed or "")):
        pods.setdefault(endpoint.uid or endpoint.url, endpoint)
    workers: dict[str, Endpoint] = {}
    for endpoint in sorted(pods.values(), key=lambda each: (intake(each), each.url, each.uid)):
        workers.setdefault(endpoint.url, endpoint)
    return {
        url: DiscoveredWorker(intake(endpoint), endpoint.feed, endpoint.pod, endpoint.uid)
        for url, endpoint in sorted(workers.items())
    }
