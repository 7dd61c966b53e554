"""Where Envoy sends requests: the workers, and the endpoint picker that it asks about them."""

from __future__ import annotations

import math

from runtime.envoy.messages import Message, address, extension, percent, pipe, seconds, typed
from runtime.envoy.settings import DataPlane

WORKERS, PICKER, ADMIN, ROUTER = "workers", "picker", "admin", "router"
METADATA, DESTINATION = "envoy.lb", "x-gateway-destination-endpoint"
"""Where the picker says who takes a request: namespace and key of its metadata, which no client can set."""
SERVED = "x-gateway-destination-endpoint-served"
"""Where Envoy says who took it."""
PICKER_HEALTH = "liveness"
"""What the picker is asked by. Of its names this one stays healthy while the router drains, and decides."""
WORKER_HEALTH = "/health"
WORKER_IDLE = 4.0
"""Seconds for which a connection to a worker is kept: vLLM closes its own after 5."""
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def workers(plane: DataPlane) -> Message:
    """The workers that the router lists. Which of them takes a request is said by the picker: the first that can be
    used of its list, on a retry the next. Without it, or if none of them can be used, the one of two that has fewer
    requests."""
    timeouts, retries = plane.timeouts, plane.retries
    most = plane.limits.requests
    least = extension("least_request", "load_balancing_policies.least_request.v3.LeastRequest")
    named = {"metadata": {"key": METADATA, "path": [{"key": DESTINATION}]}}
    override = extension(
        "override_host",
        "load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[named],
        fallback_policy={"policies": [{"typed_extension_config": least}]},
        selected_host_key={"key": METADATA, "path": [{"key": SERVED}]},
    )
    check = max(timeouts.stall / 4.0, 0.1)
    return {
        "name": WORKERS,
        "type": "EDS",
        "eds_cluster_config": {
            "eds_config": {
                "path_config_source": {"path": plane.files.endpoints},
                "resource_api_version": "V3",
                "initial_fetch_timeout": "1s",
            }
        },
        "connect_timeout": seconds(timeouts.connect),
        "per_connection_buffer_limit_bytes": 2**20,
        "load_balancing_policy": {"policies": [{"typed_extension_config": override}]},
        # If no worker is healthy, any is worth a try.
        "common_lb_config": {"healthy_panic_threshold": {"value": 1.0}},
        "ignore_health_on_host_removal": True,
        # A worker that does not answer for as long as a request may stall: what it has not begun to answer goes on.
        "health_checks": [
            {
                "timeout": seconds(check),
                "interval": seconds(check),
                "no_traffic_interval": seconds(check),
                "unhealthy_threshold": 4,
                "healthy_threshold": 1,
                "http_health_check": {"path": WORKER_HEALTH},
            }
        ],
        "close_connections_on_host_health_failure": True,
        "outlier_detection": _outliers(plane),
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_requests": most,
                    "max_connections": most,
                    "max_pending_requests": most,
                    "retry_budget": {
                        "budget_percent": percent(retries.share),
                        "min_retry_concurrency": math.ceil(retries.floor),
                    },
                }
            ]
        },
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                common_http_protocol_options={"idle_timeout": seconds(WORKER_IDLE)},
                explicit_http_config={"http_protocol_options": {}},
            )
        },
    }


def _outliers(plane: DataPlane) -> Message:
    ejection = plane.ejection
    ejected = 100 if ejection.consecutive else 0
    return {
        "consecutive_5xx": max(ejection.consecutive, 1),
        "enforcing_consecutive_5xx": ejected,
        "consecutive_gateway_failure": max(ejection.consecutive, 1),
        "enforcing_consecutive_gateway_failure": ejected,
        "enforcing_success_rate": 0,
        "enforcing_failure_percentage": 0,
        "interval": "1s",
        "base_ejection_time": seconds(ejection.first),
        "max_ejection_time": seconds(max(ejection.longest, ejection.first)),
        "max_ejection_percent": round(100 * ejection.share),
        "always_eject_one_host": ejection.share > 0,
        # Health checks ask less of a worker than requests do.
        "successful_active_health_check_uneject_host": False,
    }


def picker(plane: DataPlane) -> Message:
    """The picker beside Envoy. While its health check fails no stream is opened to it and those that are open end, so
    that requests wait for a frozen one no longer than for the check."""
    asking = plane.asking
    most = 4 * plane.limits.requests
    # Where the check fails Envoy opens no stream any more, but lets those wait that are open. Pings end them.
    keepalive = {"interval": seconds(asking.check_interval), "timeout": seconds(asking.check_timeout)}
    return _local(PICKER, pipe(plane.files.picker)) | {
        # One that is not healthy is not asked.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0.0}},
        "health_checks": [
            {
                "timeout": seconds(asking.check_timeout),
                "interval": seconds(asking.check_interval),
                "no_traffic_interval": seconds(asking.check_interval),
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": PICKER_HEALTH},
            }
        ],
        "close_connections_on_host_health_failure": True,
        "circuit_breakers": {"thresholds": [{"max_requests": most, "max_pending_requests": most}]},
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                explicit_http_config={"http2_protocol_options": {"connection_keepalive": keepalive}},
            )
        },
    }


def admin(plane: DataPlane) -> Message:
    """Envoy's own administration interface, for the listener that serves two of its paths."""
    return _local(ADMIN, pipe(plane.files.admin))


def router(port: int) -> Message:
    """The router's management port, for the listener that passes on one of its paths."""
    return _local(ROUTER, address("127.0.0.1", port))


def _local(name: str, where: Message) -> Message:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "0.25s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": where}}]}]},
    }
