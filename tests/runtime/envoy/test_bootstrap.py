"""Envoy's configuration as a function of settings: which paths are passed on, whose defaults hold, and that the real
Envoy accepts what is built.

Not covered: how an Envoy with it behaves (tests/envoy/test_data_plane.py), and which settings a manifest gives it
(tests/controller).
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.server.paths import Access, access
from router.settings import Settings as RouterSettings
from runtime.envoy.bootstrap import bootstrap, endpoints
from runtime.envoy.routes import virtual_host
from runtime.envoy.settings import Asking, DataPlane, Ejection, Files, Limits, Retries, Timeouts, Tls
from runtime.envoy.tls import secrets
from runtime.tls import self_signed
from tests.envoy.gateway import BINARY

FILES = Files("/run/kvcluster/endpoints.json", "/run/kvcluster/picker.sock", "/run/kvcluster/admin.sock")
PLANE = DataPlane(FILES, 8000)


def passed(path: str, plane: DataPlane = PLANE) -> bool:
    """Whether the first route that matches leads to a worker. Matching as in Envoy's documentation of `RouteMatch`."""
    for route in virtual_host(plane)["routes"]:
        match = route["match"]
        separated = match.get("path_separated_prefix")
        if (
            path == match.get("path")
            or ("safe_regex" in match and re.fullmatch(match["safe_regex"]["regex"], path))
            or (separated is not None and (path == separated or path.startswith(separated + "/")))
            or ("prefix" in match and path.startswith(match["prefix"]))
        ):
            return "route" in route
    raise AssertionError(f"no route matches {path}")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/meta-llama/Llama-2-13b-hf", "/tokenize",
        "/v1/responses/resp_1/cancel", "/invocations", "/v2/rerank", "/rerank", "/v1/chat/", "/", "/v1", "/v1/",
        "/health", "/metrics", "/v1/load_lora_adapter", "/v1/chatter", "/v1/chat;x", "/v1/models/a;b/..;/x",
        "/v1/models/%2e%2e", "/v1/models/%252e", "/v1/models/a\\b", "/v1/models/%5c", "/v1/models/x%", "/tokenize/x",
        "/v1/models/ü", "/v1/internal", "/collective_rpc", "/v1/realtime", "/sleep", "/v1/chat/%00",
        "/v1/models/..%20/metrics", "/v1/models/%20..", "/v1/models/%20", "/v1/models/a%20b", "/v1/models/a%3Ab",
    ],
)  # fmt: skip
def test_no_path_is_passed_on_that_the_routers_own_port_refuses(path: str) -> None:
    assert not passed(path) or access(unquote(path)) is Access.PASSED
    if "%" not in path and path.isascii() and not set(path) & set("\\;"):
        assert passed(path) == (access(path) is Access.PASSED)


@given(st.lists(st.sampled_from(["a", ".", "..", "%20", ";", "%3A", "/"]), max_size=7).map("".join))
def test_whatever_a_client_appends_is_refused_by_both(end: str) -> None:
    """Envoy has resolved dots and empty segments before it looks for a route."""
    path = "/v1/models/" + end
    if not {".", ".."} & {*path.split("/")} and "//" not in path:
        assert not passed(path) or access(unquote(path)) is Access.PASSED


def test_paths_are_opened_by_name() -> None:
    path = "/v1/load_lora_adapter"
    assert passed(path, replace(PLANE, allowed_paths=(path,)))
    assert passed("/v1/models/fine%20tuned%3A1")


def test_defaults_are_those_of_the_routers_own_port() -> None:
    own = {name: field.default for name, field in RouterSettings.model_fields.items()}
    limits, timeouts, retries, ejection = Limits(), Timeouts(), Retries(), Ejection()
    assert (limits.body_bytes, limits.header_bytes) == (own["max_body_bytes"], own["max_header_bytes"])
    assert (limits.headers, limits.requests) == (own["max_headers"], own["max_concurrent_requests"])
    assert limits.total_body_bytes == RouterSettings().total_body_bytes
    for name in ("connect", "answer", "idle", "stall", "header", "body", "write"):
        assert getattr(timeouts, name) == own[f"{name}_timeout"], name
    assert timeouts.keep_alive == own["keep_alive"]
    assert (retries.attempts, retries.share, retries.floor) == (
        own["retry_attempts"], own["retry_share"], own["retry_floor"],
    )  # fmt: skip
    assert (ejection.consecutive, ejection.first, ejection.longest, ejection.share) == (
        own["eject_after"], own["eject_seconds"], own["eject_longest"], own["eject_share"],
    )  # fmt: skip


def test_workers_are_listed_by_address() -> None:
    written = endpoints(["10.0.0.1:8100", "[fd00::1]:80"], 7)
    assert written["version_info"] == "7"
    (assignment,) = written["resources"]
    listed = assignment["endpoints"][0]["lb_endpoints"]
    addresses = [each["endpoint"]["address"]["socket_address"] for each in listed]
    assert [(each["address"], each["port_value"]) for each in addresses] == [("10.0.0.1", 8100), ("fd00::1", 80)]


def _variants(folder: Path) -> dict[str, DataPlane]:
    files = Files(str(folder / "endpoints.json"), str(folder / "picker.sock"), str(folder / "admin.sock"))
    plain = DataPlane(files, 8000)
    tls = Tls(str(folder), str(folder), str(folder / "ca.crt"))
    return {
        "defaults": plain,
        "everything": DataPlane(
            files, 8443, "127.0.0.1", 9001, tls, Limits(2**31, 2**40, 2**20, 10_000, 1_000_000), Timeouts(stall=86_400),
            Retries(64, 1.0, 10_000), Ejection(1_000_000, 86_400, 86_400, 1.0), Asking(fail_open=False), "json",
            ("https://chat.example.com", "*"), ("/v1/load_lora_adapter",),
        ),
        "least": DataPlane(
            files, 1, ready_port=2, limits=Limits(1_024, 1_024, 1_024, 8, 1), access_log="text",
            timeouts=Timeouts(*[1e-6] * 8), retries=Retries(1, 0.0, 0.0), ejection=Ejection(0, 1e-6, 1e-6, 0.0),
            tls=replace(tls, client_ca=None),
        ),
    }  # fmt: skip


@pytest.mark.envoy
async def test_envoy_accepts_what_is_built(tmp_path: Path) -> None:
    (tmp_path / "endpoints.json").write_text(json.dumps(endpoints(["127.0.0.1:1"], 1)))
    pair = self_signed("data-plane")
    for name, content in {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": pair.certificate}.items():
        (tmp_path / name).write_bytes(content)

    async def complaint(name: str, plane: DataPlane) -> str:
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps(bootstrap(plane)))
        arguments = ["--mode", "validate", "--config-path", str(config), "--log-level", "error"]
        process = await asyncio.create_subprocess_exec(
            BINARY, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        return "" if process.returncode == 0 else output.decode()

    variants = _variants(tmp_path)
    for name, content in _secrets(variants["everything"]).items():
        (tmp_path / name).write_text(json.dumps(content))
    complaints = await asyncio.gather(*(complaint(name, plane) for name, plane in variants.items()))
    assert dict(zip(variants, complaints, strict=True)) == dict.fromkeys(variants, "")


def _secrets(plane: DataPlane) -> Any:
    assert plane.tls is not None
    return secrets(plane.tls)
