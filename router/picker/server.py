"""The picker's gRPC server: streams of Envoy's ext_proc, and gRPC health checks."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME
from grpc_health.v1.health import aio as health

from kvcache.errors import ApiError
from router.metrics.picker import PickerMetrics
from router.picker.picker import Picker
from router.picker.protocol import ProcessingRequest
from router.picker.stream import BodyBudget, ProtocolError, Refusal, Stream, StreamState
from runtime.logs import EventLogger
from runtime.tls import Certificates

logger = EventLogger(__name__)

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
LIVENESS, READINESS = "liveness", "readiness"
HEALTH_NAMES = ("", LIVENESS, READINESS, SERVICE, "inference-extension", SERVICE_NAME)
"""Names by which gateways ask. All but `LIVENESS` say whether requests should come here."""
SWEEP = 0.25
"""Seconds between two looks at what is over or late."""
MESSAGE_ROOM = 2**20
"""Bytes of a message beside a body."""


class Closing(Enum):
    """Why a stream is closed from here."""

    LATE = auto()
    """The request did not come within its time."""
    SHED = auto()
    """Its answer need not be waited for: the gateway goes on without the picker."""


@dataclass(frozen=True, slots=True)
class PickerLimits:
    """Bounds on what streams may take. Seconds, bytes and streams."""

    request_seconds: float = 30.0
    """For a whole request to arrive."""
    answer_seconds: float = 600.0
    """For which the headers, or the next piece, of an answer are waited for."""
    largest_body: int = 64 * 2**20
    all_bodies: int = 512 * 2**20
    reading: int = 4096
    """Streams whose request is being read or decided."""
    header_bytes: int = 65_536
    streams: int = 20_000
    """Streams in all; more are refused by the gRPC server."""


class _Served:
    """One stream that is being served."""

    __slots__ = ("closing", "deadline", "stream", "task")

    def __init__(self, stream: Stream, deadline: float) -> None:
        self.stream = stream
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.deadline = deadline
        self.closing: Closing | None = None

    def close(self, why: Closing) -> None:
        if self.closing is None and self.task is not None:
            self.closing = why
            self.task.cancel()


class PickerServer:
    """Serves one picker on a TCP port, with TLS unless there are no `certificates`, and on a Unix socket without it."""

    def __init__(
        self,
        picker: Picker,
        metrics: PickerMetrics,
        limits: PickerLimits,
        clock: Callable[[], float],
        *,
        full: bool = False,
        conformance: bool = False,
    ) -> None:
        self.budget = BodyBudget(limits.largest_body, limits.all_bodies)
        self._picker = picker
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self._full = full
        self._conformance = conformance
        self._open: set[_Served] = set()
        self._reading = 0
        self._serving = True
        """New requests are followed to their answers."""
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=limits.streams,
            options=[
                ("grpc.max_receive_message_length", limits.largest_body + MESSAGE_ROOM),
                ("grpc.max_metadata_size", 16_384),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        handler = grpc.stream_stream_rpc_method_handler(self._process)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": handler}),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health_server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
        self._sweeper: asyncio.Task[None] | None = None
        self.last_request = -math.inf
        """When the last request came, as a time of the clock."""
        self.port = 0
        self.health_port = 0
        metrics.streams.set_function(lambda: len(self._open))
        metrics.body_bytes.set_function(lambda: self.budget.used)
        metrics.tickets.set_function(lambda: len(picker.following.unobserved))

    def listen(self, address: str, certificates: Certificates | None, path: Path | None, health_address: str) -> None:
        """Bind. Raises `OSError`."""
        try:
            if address:
                self.port = (
                    self._server.add_insecure_port(address)
                    if certificates is None
                    else self._server.add_secure_port(address, _credentials(certificates))
                )
            if path is not None:
                path.unlink(missing_ok=True)
                self._server.add_insecure_port(f"unix:{path}")
            if health_address:
                self.health_port = self._health_server.add_insecure_port(health_address)
        except RuntimeError as error:
            raise OSError(f"the picker cannot listen: {error}") from None

    @property
    def in_flight(self) -> int:
        """Open streams."""
        return len(self._open)

    async def start(self) -> None:
        for name in HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        await self._health_server.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def ready(self, *, ready: bool) -> None:
        """Say to health checks whether requests should come here."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_NAMES:
            if name != LIVENESS:
                await self._health.set(name, status)

    async def stop(self, grace: float) -> None:
        """Take no new streams, and let those go that wait for answers; requests being read are answered first."""
        self._serving = False
        await self.ready(ready=False)
        stopping = asyncio.create_task(self._server.stop(grace))
        for served in list(self._open):
            if served.stream.state in (StreamState.ROUTED, StreamState.ANSWERING):
                served.close(Closing.SHED)
        await stopping
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await self._health_server.stop(0)

    # --- streams ----------------------------------------------------------------------------------------

    async def _process(self, _: Any, context: Any) -> None:
        now = self.last_request = self._clock()
        stream = Stream(self.budget, full=self._full, conformance=self._conformance)
        served = _Served(stream, now + self._limits.request_seconds)
        self._open.add(served)
        self._reading += 1
        reading = True
        try:
            if self._reading > self._limits.reading:
                error = ApiError(503, "Too many requests are being read. Try again later.")
                await context.read()
                await self._send(context, self._refuse(stream, Refusal(error, "overloaded", [(b"retry-after", b"1")])))
                return
            while stream.state is not StreamState.ENDED:
                raw = await context.read()
                if raw is grpc.aio.EOF:
                    return
                replies = stream.receive(ProcessingRequest.FromString(raw))
                if stream.state is StreamState.DECIDING:
                    replies = await self._decide(stream, replies, now)
                    self._reading -= 1
                    reading = False
                    if not self._serving:
                        await self._send(context, replies)
                        return
                served.deadline = self._clock() + (
                    self._limits.request_seconds if reading else self._limits.answer_seconds
                )
                await self._send(context, replies)
        except (DecodeError, ProtocolError, UnicodeError) as wrong:
            self._metrics.streams_ended.labels("protocol").inc()
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not what ext_proc sends: {wrong}")
        except asyncio.CancelledError:
            if served.closing is None or (served.task is not None and served.task.uncancel() > 0):
                self._metrics.streams_ended.labels("cut").inc()
                raise
            if served.closing is Closing.LATE and reading and stream.state is not StreamState.OPEN:
                error = ApiError(408, "The request's body did not arrive in time.", type="TimeoutError")
                await self._send(context, self._refuse(stream, Refusal(error, "timeout")))
        finally:
            if reading:
                self._reading -= 1
            self._open.discard(served)
            if stream.state is not StreamState.ENDED:
                stream.end()

    async def _decide(self, stream: Stream, replies: list[bytes], arrived: float) -> list[bytes]:
        try:
            answer, dispatched = await self._picker.pick(stream.request, arrived)
        except Refusal as refusal:
            return [*replies, *self._refuse(stream, refusal)]
        self._metrics.picks.labels("picked").inc()
        return [*replies, *stream.routed(answer, dispatched)]

    def _refuse(self, stream: Stream, refusal: Refusal) -> list[bytes]:
        self._metrics.picks.labels(refusal.why).inc()
        return stream.refused(refusal)

    @staticmethod
    async def _send(context: Any, replies: list[bytes]) -> None:
        for reply in replies:
            await context.write(reply)

    # --- what time ends ---------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            now = self._clock()
            for served in list(self._open):
                if served.deadline <= now:
                    served.close(Closing.LATE)
            for why, ended in self._picker.following.unobserved.sweep(now).items():
                self._metrics.released.labels(why.value).inc(ended)


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """What handshakes use: read anew when the certificate has changed."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = certificates.current()
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)])

    pair = certificates.current()
    noted = [pair]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        with contextlib.suppress(Exception):
            if certificates.current() is noted[0]:
                return None
            noted[0] = certificates.current()
            return configuration()
        return None

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch)
