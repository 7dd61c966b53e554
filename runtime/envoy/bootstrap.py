"""Envoy's bootstrap configuration, and the files beside it that it follows."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.envoy.clusters import ADMIN, METADATA, PICKER, ROUTER, admin, picker, router, workers
from runtime.envoy.clusters import WORKERS as WORKERS_CLUSTER
from runtime.envoy.logs import access_logs
from runtime.envoy.messages import Message, address, extension, pipe, seconds, typed
from runtime.envoy.routes import silence, virtual_host
from runtime.envoy.settings import DataPlane
from runtime.envoy.tls import transport_socket

SOCKET_MODE = 0o666
"""Permissions of the administration interface: its folder decides who gets there."""
CLIENTS = "clients"
"""Name of the data port, in statistics, too."""
PICKER_DETAILS = "picker"
"""With this the picker begins the reason that it gives for an answer of its own, whose body stays as it is."""
_HEAP = 256 * 2**20
"""Bytes that Envoy takes beside bodies."""
_COPIES = 2
"""A body is held once for retries, and once as the message to the picker."""
_SLOW_BODY = 10
"""How many times the silence that is allowed within a body it may take as a whole. Envoy measures no silence."""
_NOT_FROM_CLIENTS = (
    "x-gateway-destination-endpoint",
    "x-gateway-destination-endpoint-subset",
    "test-epp-endpoint-selection",
)


def bootstrap(plane: DataPlane) -> Message:
    """The whole configuration of one Envoy, as JSON. It needs no control plane."""
    listeners = [_clients(plane)]
    clusters = [workers(plane), picker(plane)]
    if plane.ready_port is not None:
        listeners.append(_ready(plane, plane.ready_port))
        clusters.append(admin(plane))
        if plane.router_port is not None:
            clusters.append(router(plane.router_port))
    return {
        "node": {"id": "kvcluster", "cluster": "kvcluster"},
        "admin": {"address": pipe(plane.files.admin, SOCKET_MODE)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        "overload_manager": _overload(plane),
    }


def endpoints(workers: Iterable[str], version: int) -> Message:
    """The content of `Files.endpoints`: `ip:port` of each worker. Which of them are healthy Envoy finds out itself."""
    listed = [{"endpoint": {"address": _address(each)}} for each in workers]
    assignment = typed(
        "config.endpoint.v3.ClusterLoadAssignment",
        cluster_name=WORKERS_CLUSTER,
        endpoints=[{"lb_endpoints": listed}],
    )
    return {"version_info": str(version), "resources": [assignment]}


def _address(endpoint: str) -> Message:
    host, _, port = endpoint.rpartition(":")
    return address(host.strip("[]"), int(port))


def _clients(plane: DataPlane) -> Message:
    limits, timeouts = plane.limits, plane.timeouts
    filters = [
        *([extension("envoy.filters.http.cors", "filters.http.cors.v3.Cors")] if plane.cors_origins else []),
        _asking(plane),
        extension("envoy.filters.http.router", "filters.http.router.v3.Router", suppress_envoy_headers=True),
    ]
    manager = extension(
        "http",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=CLIENTS,
        codec_type="AUTO",
        http_filters=filters,
        route_config={"name": CLIENTS, "virtual_hosts": [virtual_host(plane)]},
        access_log=access_logs(plane.access_log),
        early_header_mutation_extensions=[
            extension(
                "not_from_clients",
                "http.early_header_mutation.header_mutation.v3.HeaderMutation",
                mutations=[
                    *({"remove": name} for name in _NOT_FROM_CLIENTS),
                    {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}},
                ],
            )
        ],
        local_reply_config={"mappers": _own_answers()},
        use_remote_address=True,
        generate_request_id=True,
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        server_header_transformation="PASS_THROUGH",
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action="UNESCAPE_AND_FORWARD",
        common_http_protocol_options={
            "idle_timeout": seconds(timeouts.keep_alive),
            "max_headers_count": limits.headers,
            "headers_with_underscores_action": "ALLOW",
        },
        http2_protocol_options={
            "max_concurrent_streams": 256,
            "initial_stream_window_size": 2**18,
            "initial_connection_window_size": 2**20,
        },
        max_request_headers_kb=min(max(-(-limits.header_bytes // 1024), 1), 8192),
        request_headers_timeout=seconds(timeouts.header),
        request_timeout=seconds(_SLOW_BODY * timeouts.body),
        stream_idle_timeout=silence(plane),
        stream_flush_timeout=seconds(timeouts.write),
        delayed_close_timeout="1s",
    )
    chain: Message = {"filters": [manager]}
    if plane.tls is not None:
        chain["transport_socket"] = transport_socket(plane.tls)
    return {
        "name": CLIENTS,
        "address": address(plane.address, plane.port),
        "per_connection_buffer_limit_bytes": 2**18,
        "filter_chains": [chain],
    }


def _asking(plane: DataPlane) -> Message:
    """The question to the picker. The body is buffered, not streamed to it: Envoy keeps the request whole, and goes on
    with it when the picker is gone. Of the answer the picker sees the headers."""
    asking = plane.asking
    return extension(
        PICKER,
        "filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": PICKER}},
        message_timeout=seconds(asking.decision),
        failure_mode_allow=asking.fail_open,
        **({} if asking.fail_open else {"status_on_error": {"code": "ServiceUnavailable"}}),
        processing_mode={
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SEND",
            "response_body_mode": "NONE",
            "response_trailer_mode": "SKIP",
        },
        metadata_options={
            "forwarding_namespaces": {"untyped": [METADATA]},
            "receiving_namespaces": {"untyped": [METADATA]},
        },
    )


_KINDS = {400: "BadRequestError", 404: "NotFoundError", 408: "TimeoutError", 503: "ServiceUnavailableError"}
_WORDS = {
    400: "The request cannot be read.",
    404: "Not found.",
    408: "The request did not arrive in time.",
    413: "The request's body is too large.",
    429: "Too many requests. Try again later.",
    431: "The request's headers are too large.",
    500: "Internal server error.",
    502: "The worker's answer cannot be read.",
    503: "No worker can take the request now. Try again later.",
    504: "No worker has answered in time.",
}


def _own_answers() -> list[Message]:
    """Errors that Envoy itself answers with, in the shape of OpenAI's API."""
    return [_own_answer(status) for status in _WORDS]


def _own_answer(status: int) -> Message:
    said = "response.code_details"
    own = extension(
        "own",
        "access_loggers.filters.cel.v3.ExpressionFilter",
        expression=f"!{said}.startsWith('{PICKER_DETAILS}') && {said} != 'direct_response'",
    )
    this = {"comparison": {"op": "EQ", "value": {"default_value": status, "runtime_key": "own_answer"}}}
    error = {"message": _WORDS[status], "type": _KINDS.get(status, "BadRequestError"), "param": None, "code": status}
    if status >= 500:
        error["type"] = _KINDS.get(status, "InternalServerError")
    mapper: Message = {
        "filter": {"and_filter": {"filters": [{"status_code_filter": this}, {"extension_filter": own}]}},
        "body_format_override": {"json_format": {"error": error}},
    }
    if status in (429, 503):
        retry = {"header": {"key": "retry-after", "value": "1"}, "append_action": "ADD_IF_ABSENT"}
        mapper["headers_to_add"] = [retry]
    return mapper


_SILENT = ("UF", "UH", "UC", "UR", "UT")
"""What Envoy notes of a server that cannot be reached, cuts off, or does not answer in time."""


def _ready(plane: DataPlane, port: int) -> Message:
    """For probes and Prometheus: whether Envoy's threads serve, whether requests should come here, and its statistics.
    No other path of the administration interface is open to the network.

    The router says whether requests should come. Where they go on without it, a router that says nothing is as good as
    a ready one: the probe fails when the router wants no requests, not when it is frozen. Envoy's own `/ready` would
    not do, for it fails as soon as connections are to be closed, while the last router goes on serving.
    """
    asked = ADMIN if plane.router_port is None else ROUTER
    paths: list[Message] = [
        {"match": {"path": "/live"}, "direct_response": {"status": 200, "body": {"inline_string": "LIVE\n"}}},
        {"match": {"path": "/ready"}, "route": {"cluster": asked, "timeout": "1s"}},
        {"match": {"path": "/stats/prometheus"}, "route": {"cluster": ADMIN}},
    ]
    silent: Message = {
        "filter": {"response_flag_filter": {"flags": list(_SILENT)}},
        "status_code": 200,
        "body": {"inline_string": "the router does not say, and requests go on without it\n"},
    }
    tolerant = plane.router_port is not None and plane.asking.fail_open
    manager = extension(
        "http",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="ready",
        http_filters=[extension("envoy.filters.http.router", "filters.http.router.v3.Router")],
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": paths}]},
        **({"local_reply_config": {"mappers": [silent]}} if tolerant else {}),
    )
    return {
        "name": "ready",
        "address": address(plane.address, port),
        "ignore_global_conn_limit": True,
        "filter_chains": [{"filters": [manager]}],
    }


def _overload(plane: DataPlane) -> Message:
    """Bounds on memory and connections. Bodies have no bound in total of their own in Envoy: what all of them may take
    is added to the heap, and near its end requests are refused."""
    heap = _HEAP + _COPIES * plane.limits.total_body_bytes
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            extension(
                "envoy.resource_monitors.fixed_heap",
                "resource_monitors.fixed_heap.v3.FixedHeapConfig",
                max_heap_size_bytes=heap,
            ),
            extension(
                "envoy.resource_monitors.global_downstream_max_connections",
                "resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                max_active_downstream_connections=plane.limits.connections,
            ),
        ],
        "actions": [
            _at(0.90, "envoy.overload_actions.shrink_heap"),
            _at(0.95, "envoy.overload_actions.stop_accepting_requests"),
        ],
    }


def _at(share: float, action: str) -> Message:
    trigger = {"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": share}}
    return {"name": action, "triggers": [trigger]}
