"""GET /metrics, whatever it tells."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from worker.asgi import HttpRequest


class Exposition:
    """The endpoint: every metric of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    async def metrics(self, request: HttpRequest, service: object) -> None:
        """Text format by default, OpenMetrics by Accept."""
        encoder, content_type = choose_encoder(request.header(b"accept"))
        await request.reply(200, encoder(self._registry), (b"content-type", content_type.encode()))


def process_metrics(registry: CollectorRegistry) -> None:
    """Register what every Python process reports: memory, CPU, garbage collection, version."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
