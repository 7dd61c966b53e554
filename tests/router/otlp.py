"""A collector that speaks OTLP over HTTP, as far as traces are concerned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


def attributes(values: Any) -> dict[str, Any]:
    """Of a span or a resource."""
    return {each.key: _value(each) for each in values}


def _value(attribute: KeyValue) -> Any:
    kind = attribute.value.WhichOneof("value")
    return getattr(attribute.value, kind) if kind is not None else None


@dataclass
class Collector:
    """What it has received."""

    port: int = 0
    status: int = 200
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    raw: bytes = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def named(self, name: str) -> list[Span]:
        """The spans of this name, in the order of their begin."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_time_unix_nano)

    def children(self, parent: Span) -> list[str]:
        """Names of its children, in the order of their begin."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return [span.name for span in sorted(found, key=lambda span: (span.start_time_unix_nano, span.name))]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert head.startswith("post /v1/traces ")
                assert "content-type: application/x-protobuf" in head
                body = await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
                self.raw += body
                for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    self.resources.append(attributes(of_resource.resource.attributes))
                    for scope in of_resource.scope_spans:
                        self.spans.extend(scope.spans)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % self.status)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on a port of its own."""
    collector = Collector()
    server = await asyncio.start_server(collector._connected, "127.0.0.1", 0)
    collector.port = server.sockets[0].getsockname()[1]
    try:
        yield collector
    finally:
        server.close()
