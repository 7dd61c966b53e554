"""Makes a picker's server from settings and the parts that it shares with the data port."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from router.core.decision import RecentDecisions
from router.core.fleet import Fleet
from router.core.unobserved import Ended, Unobserved
from router.metrics import Metrics
from router.metrics.picker import PickerMetrics
from router.picker.dispatched import Following
from router.picker.picker import Picker
from router.picker.server import PickerLimits, PickerServer
from router.server.admission import Admission
from router.server.affinity import Callers
from router.server.auth import Gate
from router.server.models import Models
from router.server.prompts import PromptReader
from runtime.tls import CertificateFiles, SelfSigned

if TYPE_CHECKING:
    from router.settings import Settings


def make_server(
    settings: Settings,
    certificates: CertificateFiles | None,
    fleet: Fleet,
    prompts: PromptReader,
    models: Models,
    metrics: Metrics,
    registry: CollectorRegistry,
    recent: RecentDecisions,
    clock: Callable[[], float],
    on_busy: Callable[[str], None],
    callers: Callers,
    admission: Admission | None,
    gate: Gate | None,
) -> PickerServer:
    """A server that listens. Raises `OSError` if it cannot."""
    counts = PickerMetrics(registry)

    def released(why: Ended) -> None:
        counts.released.labels(why.value).inc()

    following = Following(
        fleet,
        Unobserved(fleet.reported, settings.picker_ticket_limit),
        metrics,
        clock,
        on_busy,
        released,
        full=settings.response_processing == "full",
        explains=settings.envoy_endpoints is not None,
    )
    picker = Picker(following, prompts, models, recent, clock, settings.picker_fallbacks, callers, admission, gate)
    limits = PickerLimits(
        request_seconds=settings.body_timeout,
        answer_seconds=settings.answer_timeout,
        largest_body=settings.max_body_bytes,
        all_bodies=settings.total_body_bytes,
        reading=settings.max_concurrent_requests,
        header_bytes=settings.max_header_bytes,
        streams=settings.picker_streams,
    )
    server = PickerServer(picker, counts, limits, clock, full=following.full, conformance=settings.picker_conformance)
    server.listen(
        settings.picker_host,
        settings.picker_port,
        (certificates or SelfSigned()) if settings.picker_tls else None,
        settings.picker_socket,
        settings.picker_health_port,
    )
    return server
