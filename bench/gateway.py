"""The configuration of an Envoy that is a gateway as others run one: a listener, a picker that it asks, workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.envoy.messages import Message, address, extension, typed

_HTTP = "extensions.upstreams.http.v3.HttpProtocolOptions"


@dataclass(frozen=True, slots=True)
class Listener:
    """A port for clients."""

    picker: str = ""
    """Name of the picker that it asks; empty: none."""
    buffered: bool = False
    """Whether the picker gets the request's body whole, and of an answer the headers alone; else both bodies are sent
    in full duplex, as gateways do."""


@dataclass(frozen=True, slots=True)
class Picker:
    """A picker's port on this machine."""

    port: int
    tls: bool = False
    requests: int = 0
    """After which a connection is replaced; 0: never."""


def gateway_config(listeners: Mapping[int, Listener], pickers: Mapping[str, Picker], workers: Sequence[int]) -> Message:
    """A listener at each port; `workers` are ports, too, which requests go to in turn."""
    return {
        "static_resources": {
            "listeners": [_listener(port, each) for port, each in listeners.items()],
            "clusters": [_cluster("workers", workers), *(_asked(name, each) for name, each in pickers.items())],
        }
    }


def _listener(port: int, listener: Listener) -> Message:
    filters = [extension("router", "filters.http.router.v3.Router")]
    if listener.picker:
        filters.insert(0, _asking(listener))
    route = {"match": {"prefix": "/"}, "route": {"cluster": "workers", "timeout": "0s"}}
    manager = extension(
        "http",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="http",
        http_filters=filters,
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    )
    return {"address": address("127.0.0.1", port), "filter_chains": [{"filters": [manager]}]}


def _asking(listener: Listener) -> Message:
    modes = (
        {"request_body_mode": "BUFFERED", "response_body_mode": "NONE"}
        if listener.buffered
        else {
            "request_body_mode": "FULL_DUPLEX_STREAMED", "response_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND", "response_trailer_mode": "SEND",
        }
    )  # fmt: skip
    # Which a gateway cannot allow for bodies that it sends whole.
    length = {} if listener.buffered else {"allow_content_length_header": True}
    return extension(
        "picker",
        "filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": listener.picker}, "timeout": "60s"},
        message_timeout="60s",
        processing_mode=modes,
        **length,
    )


def _asked(name: str, picker: Picker) -> Message:
    common = {"common_http_protocol_options": {"max_requests_per_connection": picker.requests}}
    http2 = typed(_HTTP, explicit_http_config={"http2_protocol_options": {}}, **(common if picker.requests else {}))
    options: dict[str, Any] = {"typed_extension_protocol_options": {"envoy." + _HTTP: http2}}
    if picker.tls:
        options["transport_socket"] = extension("tls", "transport_sockets.tls.v3.UpstreamTlsContext")
    return _cluster(name, [picker.port], **options)


def _cluster(name: str, ports: Sequence[int], **options: Any) -> Message:
    hosts = [{"endpoint": {"address": address("127.0.0.1", port)}} for port in ports]
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]}
    return {"name": name, "connect_timeout": "1s", "load_assignment": assignment, **options}
