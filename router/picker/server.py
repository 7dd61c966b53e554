"""The picker's gRPC server: streams of Envoy's ext_proc, and gRPC health checks."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
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
NOTHING = b""
"""The last message of a stream to which there is nothing to say."""
MESSAGE_ROOM = 2**20
"""Bytes of a message beside a body."""


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


_OVERLOADED = (
    ApiError(503, "Too many requests are being read. Try again later."),
    "overloaded",
    [(b"retry-after", b"1")],
)


def _late() -> ApiError:
    return ApiError(408, "The request's body did not arrive in time.", type="TimeoutError")


class _Served:
    """One stream that is being served."""

    __slots__ = ("deadline", "late", "stream", "task")

    def __init__(self, stream: Stream, deadline: float) -> None:
        self.stream = stream
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.deadline = deadline
        self.late = False
        """It has been cancelled, because what it waits for did not come in time."""

    def give_up(self) -> None:
        if not self.late and self.task is not None:
            self.late = True
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
        self._reading: set[_Served] = set()
        """Those whose request is being read or decided."""
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=limits.streams,
            options=[
                ("grpc.max_receive_message_length", limits.largest_body + MESSAGE_ROOM),
                ("grpc.max_metadata_size", 16_384),
                # Its pings take a quarter of the CPU time of a request, and it enlarges windows: without it, what a
                # stream may send before it is read stays at 64 KiB.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        handler = grpc.stream_unary_rpc_method_handler(self._process)
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
                if path.is_socket():
                    path.unlink()  # of a process that was killed
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
        """Take no new streams, and give those that are open so many seconds."""
        await self.ready(ready=False)
        await self._server.stop(grace)
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        self._picker.following.unobserved.close(self._clock())
        await self._health_server.stop(0)

    # --- streams ----------------------------------------------------------------------------------------

    async def _process(self, _: Any, context: Any) -> bytes:
        """Serve one stream. Its last message is returned, not written: then it leaves together with the stream's end,
        and the gateway never waits for a stream that is over, nor sends it an answer that would be lost."""
        now = self.last_request = self._clock()
        stream = Stream(self.budget, full=self._full, conformance=self._conformance)
        served = _Served(stream, now + self._limits.request_seconds)
        self._open.add(served)
        self._reading.add(served)
        try:
            while True:
                raw = await context.read()
                if raw is grpc.aio.EOF:
                    return NOTHING
                replies = await self._replies(served, raw, now)
                last = replies.pop() if stream.state is StreamState.ENDED else None
                for reply in replies:
                    await context.write(reply)
                if last is not None:
                    return last
        except (DecodeError, ProtocolError, UnicodeError) as wrong:
            self._metrics.broken.labels("protocol").inc()
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not what ext_proc sends: {wrong}")
            raise
        except asyncio.CancelledError:
            if not served.late or (served.task is not None and served.task.uncancel() > 0):
                self._metrics.broken.labels("cut").inc()
                raise
            if stream.state is not StreamState.COLLECTING:
                return NOTHING
            (reply,) = self._refuse(stream, Refusal(_late(), "timeout"))
            return reply
        finally:
            self._reading.discard(served)
            self._open.discard(served)
            if stream.state is not StreamState.ENDED:
                stream.end()

    async def _replies(self, served: _Served, raw: bytes, arrived: float) -> list[bytes]:
        """What to answer to a message."""
        stream, limits = served.stream, self._limits
        try:
            if stream.state is StreamState.OPEN:
                if len(raw) > limits.header_bytes:
                    why = f"The request's headers are larger than {limits.header_bytes} bytes."
                    raise Refusal(ApiError(431, why), "too_large")
                if len(self._reading) > limits.reading:
                    raise Refusal(*_OVERLOADED)
            replies = stream.receive(ProcessingRequest.FromString(raw))
            if stream.state is StreamState.DECIDING:
                served.deadline = math.inf
                answer, dispatched = await self._picker.pick(stream.request, arrived)
                self._metrics.picks.labels("picked").inc()
                replies.extend(stream.routed(answer, dispatched))
                self._reading.discard(served)
        except Refusal as refusal:
            return self._refuse(stream, refusal)
        reading = stream.state is StreamState.COLLECTING
        served.deadline = self._clock() + (limits.request_seconds if reading else limits.answer_seconds)
        return replies

    def _refuse(self, stream: Stream, refusal: Refusal) -> list[bytes]:
        self._metrics.picks.labels(refusal.why).inc()
        return stream.refused(refusal)

    # --- what time ends ---------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            now = self._clock()
            for served in list(self._open):
                if served.deadline <= now:
                    served.give_up()
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
