"""Which requests Envoy passes on, and how: the same paths as the router's own data port (`kvcache.paths`)."""

from __future__ import annotations

from kvcache.paths import COMPUTED, RESOURCES
from runtime.envoy.clusters import DESTINATION, PICKER, WORKERS
from runtime.envoy.messages import Message, extension, seconds, typed
from runtime.envoy.settings import DataPlane

_ODD = (
    r".*(?:[^A-Za-z0-9._~!$&'()*+,=:@/%-].*|%(?:.?|[^23].*|2[^0].*|3[^Aa].*)"
    r"|/(?:\.|%20)*%20(?:\.|%20)*(?:/.*)?)"
)
"""Paths that one server may read in another way than the next. They hold other characters than these, percent-encode
anything but spaces and colons, which names of models have, or have a segment of spaces and dots alone. Dots, empty
segments and `%2F` are resolved by then."""
RETRIED = (429,)
"""Statuses below 500 that another worker may better."""
_METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
_CORS = "envoy.filters.http.cors"
_UNASKED = {PICKER: typed("extensions.filters.http.ext_proc.v3.ExtProcPerRoute", disabled=True)}


def virtual_host(plane: DataPlane) -> Message:
    """All requests, whatever host they name. The first route that matches is taken."""
    opened = sorted(path for path in COMPUTED if not _in_resource(path))
    host: Message = {
        "name": "all",
        "domains": ["*"],
        "routes": [
            *([_preflights()] if plane.cors_origins else []),
            *(_passed({"path": path}, plane) for path in (*opened, *plane.allowed_paths)),
            _answered({"safe_regex": {"regex": _ODD}}, 404, _UNKNOWN),
            *(_passed({"path_separated_prefix": f"/v1/{resource}"}, plane) for resource in sorted(RESOURCES)),
            _answered({"path": "/v1/"}, 404, _UNKNOWN),
            _answered({"prefix": "/v1/"}, 404, _CLOSED),
            _answered({"prefix": "/"}, 404, _UNKNOWN),
        ],
        "request_headers_to_remove": [DESTINATION],
        # The picker has to see the whole request, and so has a second worker.
        "request_body_buffer_limit": plane.limits.body_bytes,
        "retry_policy": _retries(plane),
    }
    if plane.cors_origins:
        host["typed_per_filter_config"] = {_CORS: _cors(plane.cors_origins)}
    return host


def _in_resource(path: str) -> bool:
    return path.startswith("/v1/") and path.split("/")[2] in RESOURCES


def silence(plane: DataPlane) -> str:
    """For which a request's stream may be silent: while the router decides, too."""
    return seconds(_worker_silence(plane) + plane.asking.decision)


def _worker_silence(plane: DataPlane) -> float:
    return max(plane.timeouts.answer, plane.timeouts.idle)


def _passed(match: Message, plane: DataPlane) -> Message:
    # An answer may take as long as it likes, if it goes on.
    return {"match": match, "route": {"cluster": WORKERS, "timeout": "0s", "idle_timeout": silence(plane)}}


def _retries(plane: DataPlane) -> Message:
    previous = extension("previous_hosts", "retry.host.previous_hosts.v3.PreviousHostsPredicate")
    return {
        "retry_on": "connect-failure,refused-stream,reset,5xx,retriable-status-codes",
        "retriable_status_codes": list(RETRIED),
        "num_retries": plane.retries.attempts - 1,
        "per_try_idle_timeout": seconds(_worker_silence(plane)),
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
        "retry_host_predicate": [previous],
        "host_selection_retry_max_attempts": 5,
    }


_CLOSED = (
    '{"error":{"message":"This path is not passed on to workers: it is no part of an inference API (see '
    'spec.router.allowedPaths).","type":"NotFoundError","param":null,"code":404}}'
)
_UNKNOWN = '{"detail":"Not Found"}'


def _answered(match: Message, status: int, body: str) -> Message:
    kind = {"header": {"key": "content-type", "value": "application/json"}}
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": body}},
        "response_headers_to_add": [kind | {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
        "typed_per_filter_config": _UNASKED,
    }


def _preflights() -> Message:
    """Preflights. The filter for CORS answers them all, so that none gets to a worker, but only where a route leads to
    some. The picker would be asked about that answer, to a request that it has not seen, and where nothing goes on
    without it, that would be an error."""
    headers = [
        {"name": ":method", "string_match": {"exact": "OPTIONS"}},
        *({"name": name, "present_match": True} for name in ("origin", "access-control-request-method")),
    ]
    match = {"prefix": "/", "headers": headers}
    return {"match": match, "route": {"cluster": WORKERS}, "typed_per_filter_config": _UNASKED}


def _cors(origins: tuple[str, ...]) -> Message:
    """What pages of these origins may send. No cookies: API keys are sent by scripts, in `Authorization`."""
    every = "*" in origins
    return typed(
        "extensions.filters.http.cors.v3.CorsPolicy",
        allow_origin_string_match=[{"safe_regex": {"regex": ".*"}}] if every else [{"exact": each} for each in origins],
        allow_methods=_METHODS,
        # A wildcard does not cover this one (Fetch standard, 4.9).
        allow_headers="*, authorization",
        expose_headers="*",
        max_age="600",
        allow_credentials=False,
        forward_not_matching_preflights=False,
    )
