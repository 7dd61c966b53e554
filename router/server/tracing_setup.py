"""Whether requests are traced, and where spans go: by OpenTelemetry's own environment variables (`OTEL_*`).

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING

from runtime.logs import EventLogger
from runtime.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from router.server.tracing import Tracing

logger = EventLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""The names under which packages register their exporters, by protocol."""
_GROUP = "opentelemetry_traces_exporter"


def exporters(environ: Mapping[str, str]) -> list[str]:
    """The exporters that the variables name; none: requests are not traced.

    The SDK exports by OTLP unless told otherwise. A router does so once one of the OTLP variables says where to.
    Raises `SettingsError`.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if not named:
        named = "otlp" if any(environ.get(name) for name in _ENDPOINTS) else "none"
    names = [name.strip() for name in named.split(",") if name.strip() not in ("", "none")]
    return [_otlp(environ) if name == "otlp" else name for name in names]


def _otlp(environ: Mapping[str, str]) -> str:
    variable = next((name for name in _PROTOCOLS if environ.get(name)), "")
    protocol = environ.get(variable, "http/protobuf").strip()
    if protocol not in _OTLP:
        raise SettingsError(f"{variable}: {protocol!r} is not supported; use {' or '.join(_OTLP)}")
    return _OTLP[protocol]


def make_tracing(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """The tracing that the environment asks for; None if it asks for none, or if OpenTelemetry is not installed, which
    is logged: the variables may be meant for other processes of a pod. Raises `SettingsError` for an exporter that is
    not installed."""
    names = exporters(environ)
    if not names:
        return None
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from router.server.tracing import Tracing
    except ImportError:
        logger.warning(
            "tracing_unavailable",
            why="OTEL_* variables ask for traces, and OpenTelemetry is not installed: pip install 'kvcluster[otel]', "
            "or set OTEL_SDK_DISABLED=true",
        )
        return None
    # Read here, and not when it is used, so that a misspelt one ends the process before it serves.
    found = [_exporter(name).load() for name in names]
    try:
        provider = TracerProvider(resource=_resource(environ), shutdown_on_exit=False)
        for exporter in found:
            provider.add_span_processor(BatchSpanProcessor(exporter()))
    except ValueError as error:
        raise SettingsError(f"a variable OTEL_* has a value that cannot be used: {error}") from None
    # It warns of baggage that it cannot take, with all of it: clients' headers do not belong into logs.
    logging.getLogger("opentelemetry.baggage.propagation").setLevel(logging.ERROR)
    logger.info("tracing_started", exporters=names)
    return Tracing(provider)


def _exporter(name: str) -> EntryPoint:
    for entry in entry_points(group=_GROUP, name=name):
        return entry
    installed = sorted(entry.name for entry in entry_points(group=_GROUP))
    package = f"opentelemetry-exporter-{name.replace('_', '-')}"
    raise SettingsError(
        f"OTEL_TRACES_EXPORTER or OTEL_EXPORTER_OTLP_PROTOCOL name {name!r}, which is not installed: install "
        f"{package}, or use one of: {', '.join(installed)} (otlp with http/protobuf is otlp_proto_http)"
    )


def _resource(environ: Mapping[str, str]) -> Resource:
    """What the spans are of. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` overrule it."""
    from opentelemetry.sdk.resources import Resource

    stated = Resource.create()
    host = environ.get("HOSTNAME") or socket.gethostname()
    own = {"service.name": "kvcluster-router", "service.instance.id": host}
    with contextlib.suppress(PackageNotFoundError):  # it runs from a folder of sources
        own["service.version"] = version("kvcluster")
    if "KUBERNETES_SERVICE_HOST" in environ:
        own["k8s.pod.name"] = host
    if str(stated.attributes.get("service.name", "")).startswith("unknown_service"):
        stated = Resource({name: value for name, value in stated.attributes.items() if name != "service.name"})
    return Resource(own).merge(stated)
