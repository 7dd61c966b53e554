"""The Envoy that a manifest implies where it is the data plane, in local mode and in a cluster alike.

Its settings are those of the routers' own data port (`controller.process_settings`), from the same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from controller.api.flow_control import FlowControl
from controller.api.model import KVClusterSpec
from controller.api.routing import LogForm
from runtime.envoy.settings import Asking, DataPlane, Ejection, Files, Limits, Retries, Timeouts, Tls

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Group = TypeVar("Group", bound=DataclassInstance)

DECISION_MARGIN = 5.0
"""Seconds beyond a request's longest wait for its turn in which the router has to answer."""
LARGEST_BODIES = 4
"""Bodies of the largest size for which there is room, where the manifest does not say how much there is."""


def data_plane(
    spec: KVClusterSpec,
    files: Files,
    port: int,
    *,
    address: str,
    ready_port: int | None = None,
    router_port: int | None = None,
    tls: Tls | None = None,
    asks_for_keys: bool = False,
    holds: float = 0.0,
) -> DataPlane:
    """`port` and `address`: where clients come. `router_port`: management port of the router, for `/ready`.
    `asks_for_keys`: no request goes on without the router, because it
    alone knows the keys. `holds`: seconds for which the router holds requests while no worker is ready."""
    router = spec.router
    timeouts, liveness, retries, ejection = router.timeouts, router.liveness, router.retries, router.ejection
    return DataPlane(
        files,
        port,
        address,
        ready_port,
        tls,
        limits=_limits(spec),
        timeouts=_given(
            Timeouts(),
            connect=timeouts.connect_seconds,
            answer=timeouts.answer_seconds,
            idle=timeouts.idle_seconds,
            stall=liveness.stall_seconds,
            header=timeouts.header_seconds,
            body=timeouts.body_seconds,
            write=timeouts.write_seconds,
            keep_alive=timeouts.keep_alive_seconds,
        ),
        retries=_given(Retries(), attempts=retries.attempts, share=retries.share, floor=retries.floor),
        ejection=_given(
            Ejection(),
            consecutive=ejection.consecutive,
            first=ejection.first_seconds,
            longest=ejection.longest_seconds,
            share=ejection.share,
        ),
        asking=replace(Asking(), decision=_longest_decision(router.flow_control, holds), fail_open=not asks_for_keys),
        access_log=_LOG_FORMS[router.access_log.format],
        cors_origins=tuple(router.cors_origins),
        allowed_paths=tuple(router.allowed_paths),
        router_port=router_port,
    )


_LOG_FORMS: Mapping[LogForm, Literal["off", "text", "json"]] = {
    LogForm.OFF: "off",
    LogForm.TEXT: "text",
    LogForm.JSON: "json",
}


def _given(defaults: Group, **values: object) -> Group:
    """The defaults with those of the values that are given."""
    return replace(defaults, **{name: value for name, value in values.items() if value is not None})


def _limits(spec: KVClusterSpec) -> Limits:
    limits, defaults = spec.router.limits, Limits()
    total = limits.max_total_body_bytes
    if total is None:
        total = max(defaults.total_body_bytes, LARGEST_BODIES * limits.max_body_bytes)
    return replace(
        defaults,
        body_bytes=limits.max_body_bytes,
        total_body_bytes=max(total, limits.max_body_bytes),
        header_bytes=limits.max_header_bytes,
        headers=limits.max_headers,
        requests=limits.max_concurrent_requests,
    )


def _longest_decision(flow: FlowControl, holds: float) -> float:
    """Seconds after which a router that is alive has decided. A request may wait in it for its turn, or a worker."""
    waits = [holds, *(each.ttl_seconds for each in flow.classes if flow.enabled)]
    return max(Asking().decision, max(waits) + DECISION_MARGIN)
