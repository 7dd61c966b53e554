"""The Envoy that a manifest implies: every setting of the routers' own data port, from the same fields.

Not covered: what Envoy's configuration says of them (tests/runtime/envoy), and its process (tests/kvcluster/test_up).
"""

from __future__ import annotations

import pytest

from controller.data_plane import data_plane
from controller.process_settings import flags, router_settings
from router.settings import Settings as RouterSettings
from runtime.envoy.settings import DataPlane, Files

FILES = Files("/run/endpoints.json", "/run/picker.sock", "/run/admin.sock")
EVERYTHING = {
    "limits": {
        "maxBodyBytes": 2_048, "maxTotalBodyBytes": 4_096, "maxHeaderBytes": 8_192, "maxHeaders": 9,
        "maxConcurrentRequests": 10,
    },
    "timeouts": {
        "connectSeconds": 1.5, "answerSeconds": 2.5, "idleSeconds": 3.5, "headerSeconds": 4.5, "bodySeconds": 5.5,
        "writeSeconds": 6.5, "keepAliveSeconds": 7.5,
    },
    "retries": {"attempts": 7, "share": 0.3, "floor": 4.0},
    "liveness": {"stallSeconds": 8.5},
    "ejection": {"consecutive": 3, "firstSeconds": 9.5, "longestSeconds": 11.5, "share": 0.25},
    "accessLog": {"format": "json"},
    "corsOrigins": ["https://chat.example.com"],
    "allowedPaths": ["/v1/load_lora_adapter"],
}  # fmt: skip


@pytest.mark.parametrize("router", [pytest.param({}, id="defaults"), pytest.param(EVERYTHING, id="everything")])
def test_envoy_gets_what_the_routers_own_data_port_would(make_manifest, router):
    spec = make_manifest(router=router).spec
    own = RouterSettings.load(flags(router_settings(spec)))
    plane = data_plane(spec, FILES, 8000, address="127.0.0.1")
    limits, timeouts, retries, ejection = plane.limits, plane.timeouts, plane.retries, plane.ejection
    assert (limits.body_bytes, limits.total_body_bytes) == (own.max_body_bytes, own.total_body_bytes)
    assert (limits.header_bytes, limits.headers) == (own.max_header_bytes, own.max_headers)
    assert limits.requests == own.max_concurrent_requests
    for name in ("connect", "answer", "idle", "stall", "header", "body", "write"):
        assert getattr(timeouts, name) == getattr(own, f"{name}_timeout"), name
    assert timeouts.keep_alive == own.keep_alive
    assert (retries.attempts, retries.share, retries.floor) == (
        own.retry_attempts, own.retry_share, own.retry_floor,
    )  # fmt: skip
    assert (ejection.consecutive, ejection.first, ejection.longest, ejection.share) == (
        own.eject_after, own.eject_seconds, own.eject_longest, own.eject_share,
    )  # fmt: skip
    assert plane.access_log == own.access_log
    assert plane.cors_origins == tuple(own.cors_origins)
    assert plane.allowed_paths == tuple(own.allowed_paths)


def test_large_bodies_get_the_room_that_the_router_gives_them(make_manifest):
    spec = make_manifest(router={"limits": {"maxBodyBytes": 2**29}}).spec
    own = RouterSettings.load(flags(router_settings(spec)))
    assert data_plane(spec, FILES, 1, address="::").limits.total_body_bytes == own.total_body_bytes


def test_without_the_router_requests_go_on_unless_it_knows_the_keys(make_manifest):
    spec = make_manifest().spec
    assert data_plane(spec, FILES, 1, address="::").asking.fail_open
    assert not data_plane(spec, FILES, 1, address="::", asks_for_keys=True).asking.fail_open


def test_a_decision_may_take_as_long_as_a_request_waits(make_manifest):
    plain = make_manifest().spec
    patient = make_manifest(
        router={"flowControl": {"enabled": True, "classes": [{"name": "batch", "priority": 0, "ttlSeconds": 300}]}}
    ).spec

    def decision(spec, **fields) -> float:
        plane: DataPlane = data_plane(spec, FILES, 1, address="::", **fields)
        return plane.asking.decision

    assert decision(patient) > 300 > decision(plain)
    assert decision(plain, holds=900.0) > 900
