"""How gateways name endpoints: `ip:port`, the subset that they allow, and the list that they are answered.

Source: the endpoint picker protocol of the Gateway API Inference Extension (docs/proposals, number 004).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from kvcache.ranks import split_rank
from router.core.decision import Decision

DESTINATION = "x-gateway-destination-endpoint"
"""Request header, and key of the dynamic metadata, that lists the chosen endpoints, best first."""
METADATA = "envoy.lb"
"""Namespace of that dynamic metadata."""
SERVED = "x-gateway-destination-endpoint-served"
"""Key in the same namespace by which the gateway says which endpoint answered."""
SUBSET_METADATA = "envoy.lb.subset_hint"
SUBSET = "x-gateway-destination-endpoint-subset"


@lru_cache(maxsize=16_384)
def endpoint_of(url: str) -> str | None:
    """`ip:port` of a worker, an IPv6 address in brackets; None if its URL names a host, which no gateway resolves."""
    parts = urlsplit(split_rank(url)[0])
    host = parts.hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _host(endpoint: str) -> str:
    return endpoint.rpartition(":")[0]


def namespace(metadata: Any, name: str) -> Any:
    """The fields of a namespace of a request's metadata; None if it has none of that name."""
    return next((each.value.fields for each in metadata.filter_metadata if each.key == name), None)


def subset_of(metadata: Any) -> frozenset[str] | None:
    """The endpoints that the gateway allows, as `ip:port` or `ip`; None: it names none, and every endpoint is allowed.

    A hint that is neither a list nor a string allows nothing: whoever sends it meant to restrict the choice.
    """
    fields = namespace(metadata, SUBSET_METADATA)
    if fields is None or SUBSET not in fields:
        return None
    hint = fields[SUBSET]
    match hint.WhichOneof("kind"):
        case "list_value":
            entries: Iterable[str] = (value.string_value for value in hint.list_value.values)
        case "string_value":
            entries = hint.string_value.split(",")
        case _:
            entries = ()
    return frozenset(entry for each in entries if (entry := each.strip()))


def ineligible(urls: Iterable[str], subset: frozenset[str] | None) -> set[str]:
    """URLs of the workers that must not be chosen: outside of the subset, or without an address of their own."""
    excluded = set()
    for url in urls:
        endpoint = endpoint_of(url)
        allowed = endpoint is not None and (
            subset is None or endpoint in subset or _host(endpoint) in subset or _host(endpoint).strip("[]") in subset
        )
        if not allowed:
            excluded.add(url)
    return excluded


def ranked(decision: Decision, fallbacks: int) -> list[str]:
    """URLs of the chosen worker and of at most so many others, cheapest first, at different endpoints."""
    urls = [decision.url]
    if fallbacks and len(decision.candidates) > 1:
        taken = {endpoint_of(decision.url)}
        for candidate in sorted(decision.candidates, key=lambda each: each.cost):
            endpoint = endpoint_of(candidate.url)
            if endpoint not in taken:
                taken.add(endpoint)
                urls.append(candidate.url)
                if len(urls) > fallbacks:
                    break
    return urls


def listed(urls: Sequence[str]) -> str:
    """The value that names these workers to a gateway."""
    return ",".join(endpoint for url in urls if (endpoint := endpoint_of(url)) is not None)
