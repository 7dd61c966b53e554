"""The picker's gRPC server: streams of Envoy's ext_proc, and gRPC health checks."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from google.protobuf.message import DecodeError

from kvcache.errors import ApiError
from router.metrics.picker import PickerMetrics
from router.picker.dispatched import Dispatched
from router.picker.picker import Picker
from router.picker.protocol import ProcessingRequest
from router.picker.stream import Answer, BodyBudget, ProtocolError, Refusal, Stream, StreamState
from runtime.grpc.call import Call, CallState
from runtime.grpc.context import GrpcLimits
from runtime.grpc.frames import Status
from runtime.grpc.health import SERVICE as HEALTH
from runtime.grpc.health import Health, Serving
from runtime.grpc.server import GrpcServer
from runtime.logs import EventLogger
from runtime.process import report_crash
from runtime.sockets import listen
from runtime.tls import Certificates

logger = EventLogger(__name__)

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
LIVENESS, READINESS = "liveness", "readiness"
HEALTH_NAMES = ("", LIVENESS, READINESS, SERVICE, "inference-extension", HEALTH)
"""Names by which gateways ask. All but `LIVENESS` say whether requests should come here."""
SWEEP = 0.05
"""Seconds between two looks at which requests are over."""
LATE_SWEEPS = 5
"""Such looks between two at which streams are late."""
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

    __slots__ = ("_arrived", "_call", "_kept", "_server", "_task", "_unread", "deadline", "stream")

    def __init__(self, server: PickerServer, call: Call) -> None:
        self.stream = server.stream()
        self._server = server
        self._call = call
        self._arrived = now = server.arrived()
        self._task: asyncio.Task[None] | None = None
        """Decides."""
        self._unread: list[bytes] = []
        """Messages that came meanwhile."""
        self._kept = 0
        """Bytes of the budget that they take."""
        self.deadline = now + server.limits.request_seconds
        server.open.add(self)
        server.reading.add(self)

    # --- what the gateway does --------------------------------------------------------------------------

    def message(self, data: bytes) -> None:
        if self._task is not None:
            self._keep(data)
            return
        stream, server = self.stream, self._server
        try:
            begins = stream.state is StreamState.OPEN
            if begins:
                server.check(len(data))
            replies = stream.receive(ProcessingRequest.FromString(data))
            if begins:
                server.picker.admit(stream.request)
            if stream.state is StreamState.DECIDING:
                picked = server.picker.pick_at_once(stream.request, self._arrived)
                if picked is None:
                    self._wait(replies)
                    return
                replies += self._routed(*picked)
        except Refusal as refusal:
            replies = server.refuse(stream, refusal)
        except (DecodeError, ProtocolError, UnicodeError) as wrong:
            server.metrics.broken.labels("protocol").inc()
            self._finish(Status.INVALID_ARGUMENT, f"not what ext_proc sends: {wrong}")
            return
        self._answer(replies)

    def _keep(self, data: bytes) -> None:
        """Look at a message once it is decided where the request goes."""
        try:
            self._server.budget.take(self._kept, len(data))
        except Refusal:
            self._call.fail(Status.RESOURCE_EXHAUSTED, "too much comes before it is decided where the request goes")
            return
        self._kept += len(data)
        self._unread.append(data)

    def _take_unread(self) -> list[bytes]:
        unread, self._unread = self._unread, []
        self._server.budget.give(self._kept)
        self._kept = 0
        return unread

    def input_ended(self) -> None:
        if self._task is None:
            self._finish()

    def lost(self) -> None:
        self._server.metrics.broken.labels("cut").inc()
        if self._task is not None:
            self._task.cancel()
        self._over()

    # --- what is answered -------------------------------------------------------------------------------

    def _routed(self, answer: Answer, dispatched: Dispatched) -> list[bytes]:
        self._server.picked.inc()
        return self.stream.routed(answer, dispatched)

    def _wait(self, replies: list[bytes]) -> None:
        """Decide in a task: a thread reads the prompt, or the request has to wait for its turn."""
        self._call.pause()
        self.deadline = math.inf
        self._task = asyncio.get_running_loop().create_task(self._decide(replies))

    async def _decide(self, replies: list[bytes]) -> None:
        stream, server = self.stream, self._server
        try:
            replies += self._routed(*await server.picker.pick_later(stream.request, self._arrived))
        except Refusal as refusal:
            replies = server.refuse(stream, refusal)
        except Exception:
            logger.exception("pick_failed")
            self._finish(Status.INTERNAL, "the picker failed")
            return
        self._task = None
        self._answer(replies)
        self._call.resume()
        for data in self._take_unread():
            if stream.state is not StreamState.ENDED:
                self.message(data)
        if self._call.state is CallState.INPUT_ENDED:
            self.input_ended()

    def _answer(self, replies: list[bytes]) -> None:
        """Say this. What is said last leaves together with the stream's end: the gateway never waits for a stream that
        is over, nor sends it an answer that would be lost."""
        stream, server = self.stream, self._server
        if stream.state is StreamState.ENDED:
            self._call.finish(messages=replies)
            self._over()
            return
        if replies:
            self._call.send(replies)
        limits = server.limits
        if stream.state is StreamState.COLLECTING:
            self.deadline = server.clock() + limits.request_seconds
        else:
            server.reading.discard(self)
            self.deadline = server.clock() + limits.answer_seconds

    def give_up(self) -> None:
        """What is waited for did not come in time."""
        if self.stream.state is StreamState.COLLECTING:
            self._answer(self._server.refuse(self.stream, Refusal(_late(), "timeout")))
        else:
            self._finish()

    def _finish(self, status: Status = Status.OK, message: str = "") -> None:
        self._call.finish(status, message)
        self._over()

    def _over(self) -> None:
        self._server.reading.discard(self)
        self._server.open.discard(self)
        self._take_unread()
        if self.stream.state is not StreamState.ENDED:
            self.stream.end()


SOCKET_MODE = 0o666
"""Permissions of the Unix socket. The gateway in the same pod may be another user: the socket's folder decides."""


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
        self.picker = picker
        self.metrics = metrics
        self.limits = limits
        self.clock = clock
        self._full = full
        self._conformance = conformance
        self.open: set[_Served] = set()
        self.reading: set[_Served] = set()
        """Those whose request is being read or decided."""
        self._health = Health(HEALTH_NAMES)
        methods = {f"/{SERVICE}/Process": lambda call: _Served(self, call), **self._health.methods()}
        grpc_limits = GrpcLimits(
            limits.largest_body + MESSAGE_ROOM, limits.all_bodies + MESSAGE_ROOM, calls=limits.streams
        )
        self._server = GrpcServer(methods, grpc_limits)
        self._health_server = GrpcServer(self._health.methods())
        self._listening: list[tuple[GrpcServer, socket.socket, Certificates | None]] = []
        self._unix: socket.socket | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self.last_request = -math.inf
        """When the last request came, as a time of the clock."""
        self.port = 0
        self.health_port = 0
        self.picked = metrics.picks.labels("picked")
        metrics.streams.set_function(lambda: len(self.open))
        metrics.body_bytes.set_function(lambda: self.budget.used)
        metrics.tickets.set_function(lambda: len(picker.following.unobserved))

    def listen(
        self, host: str, port: int, certificates: Certificates | None, path: Path | None, health_port: int
    ) -> None:
        """Bind; a port of -1 is none. Raises `OSError`."""
        if port >= 0:
            picker = listen(host, port, "--picker-port")
            self.port = picker.getsockname()[1]
            self._listening.append((self._server, picker, certificates))
        if health_port >= 0:
            health = listen(host, health_port, "--picker-health-port")
            self.health_port = health.getsockname()[1]
            self._listening.append((self._health_server, health, None))
        if path is not None:
            if path.is_socket():
                path.unlink()  # of a process that was killed
            self._unix = socket.socket(socket.AF_UNIX)
            self._unix.bind(str(path))
            path.chmod(SOCKET_MODE)

    @property
    def in_flight(self) -> int:
        """Open streams."""
        return len(self.open)

    async def start(self, *, unix: bool = True) -> None:
        """Serve; the Unix socket refuses connections until `start_unix` if it is not to be served yet."""
        for server, sock, certificates in self._listening:
            await server.start(sock, certificates)
        if unix:
            await self.start_unix()
        self._sweeper = asyncio.create_task(self._sweep())
        self._sweeper.add_done_callback(report_crash)

    async def start_unix(self) -> None:
        """Serve at the Unix socket, if there is one."""
        if self._unix is not None:
            await self._server.start(self._unix)

    async def ready(self, *, ready: bool) -> None:
        """Say to health checks whether requests should come here."""
        for name in HEALTH_NAMES:
            if name != LIVENESS:
                self._health.set(name, Serving.SERVING if ready else Serving.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Take no new streams, and give those that are open so many seconds."""
        await self.ready(ready=False)
        self._health.close()
        await self._server.stop(grace)
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        self.picker.following.unobserved.close(self.clock())
        await self._health_server.stop(0)

    # --- what streams need ------------------------------------------------------------------------------

    def stream(self) -> Stream:
        return Stream(self.budget, full=self._full, conformance=self._conformance)

    def arrived(self) -> float:
        """A request has come, now."""
        self.last_request = self.clock()
        return self.last_request

    def check(self, size: int) -> None:
        """Whether a stream's first message, of so many bytes, may be read. Raises `Refusal`."""
        if size > self.limits.header_bytes:
            why = f"The request's headers are larger than {self.limits.header_bytes} bytes."
            raise Refusal(ApiError(431, why), "too_large")
        if len(self.reading) > self.limits.reading:
            raise Refusal(*_OVERLOADED)

    def refuse(self, stream: Stream, refusal: Refusal) -> list[bytes]:
        self.metrics.picks.labels(refusal.why).inc()
        self.picker.following.count(refusal.error.status)
        return stream.refused(refusal)

    # --- what time ends ---------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        for turn in count():
            await asyncio.sleep(SWEEP)
            now = self.clock()
            if turn % LATE_SWEEPS == 0:
                for served in list(self.open):
                    if served.deadline <= now:
                        served.give_up()
            for why, ended in self.picker.following.unobserved.sweep(now).items():
                self.metrics.released.labels(why.value).inc(ended)
