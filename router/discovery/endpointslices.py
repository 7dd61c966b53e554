"""From EndpointSlices to the workers behind a Service. What counts, and why, is in docs/router.md, "Discovery"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers

HTTP_PORT = "http"
"""Name of the port that takes requests; a slice whose only port has no name means that one."""
FEED_PORT = "feed"
"""Name of the port of the cache feed, where it is not the worker's own."""

FAMILIES = ("IPv4", "IPv6", "FQDN")
"""Address types, the preferred one first: a pod with several is still one worker."""


class Endpoint(NamedTuple):
    """One address of one worker, as one slice tells it."""

    family: int
    """Index into `FAMILIES`."""
    url: str
    feed: str | None
    pod: str
    uid: str
    ready: bool
    terminating: bool
    serving: bool
    """Ready but for its termination."""


Slice = tuple[Endpoint, ...]


def read_slice(found: Mapping[str, Any]) -> Slice:
    """What an EndpointSlice object says; nothing if it has no port for requests or no address."""
    port, feed_port = _ports(found.get("ports") or ())
    family = found.get("addressType")
    if port is None or family not in FAMILIES:
        return ()
    endpoints = []
    for endpoint in found.get("endpoints") or ():
        addresses = endpoint.get("addresses") or ()
        if not addresses:
            continue
        host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]  # the others have no meaning (KEP-752)
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


def _ports(ports: Iterable[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """Numbers of the ports for requests and for the feed."""
    named = {
        port.get("name") or "": port["port"]
        for port in ports
        if port.get("port") and (port.get("protocol") or "TCP") == "TCP"
    }
    request = named.get(HTTP_PORT, named.get("") if len(named) == 1 else None)
    return request, named.get(FEED_PORT)


def discovered_workers(slices: Iterable[Slice]) -> DiscoveredWorkers:
    """The workers that these slices name together, whatever their order.

    An endpoint that moves between slices is in two for a moment, and a pod with addresses of two families is in two for
    good: a pod is one worker, and so is an address.
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
