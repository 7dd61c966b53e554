"""What the endpoint picker counts beside the router's own metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from router.metrics.declared import PREFIX


class PickerMetrics:
    """Counters and gauges of one endpoint picker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.picks = Counter(
            PREFIX + "picks", "Requests of gateways, by what they were answered.", ["outcome"], registry=registry
        )
        self.broken = Counter(
            PREFIX + "picker_streams_broken", "Streams that a gateway broke off, by how.", ["why"], registry=registry
        )
        self.released = Counter(
            PREFIX + "picker_released", "Picked requests that are over, by what showed it.", ["why"], registry=registry
        )
        self.streams = Gauge(PREFIX + "picker_streams", "Open streams of gateways.", registry=registry)
        self.body_bytes = Gauge(PREFIX + "picker_body_bytes", "Bytes of bodies that streams hold.", registry=registry)
        self.tickets = Gauge(
            PREFIX + "picker_unobserved", "Picked requests whose end only reports show.", registry=registry
        )
