"""Forwards connections to a local port into a pod, through the API server and the pod's kubelet, as kubectl does.

Each connection has a WebSocket of its own (subprotocol `v4.channel.k8s.io`, kubelet's
`pkg/kubelet/cri/streaming/portforward/websocket.go`): messages begin with the number of a channel, 0 for data and 1 for
errors, and the first message of each channel is the port. The API server's proxy for pods, which other commands use,
connects to the pod itself, which the firewalls of some providers and NetworkPolicies forbid.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from runtime.kube.client import ApiServer
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.sockets import listen

PROTOCOL = "v4.channel.k8s.io"
_DATA, _ERROR = 0, 1
_CHUNK = 65_536


class ForwardError(RuntimeError):
    """A connection could not be forwarded. The message says why."""


@dataclass(slots=True)
class PortForward:
    """`pods()` names the pods that a new connection may go to, the best first; it raises `ForwardError` or
    `KubeApiError`. `on_pod(name)` is told when connections go to another pod than before, `on_error(why)` when one
    cannot be forwarded."""

    api: ApiServer
    namespace: str
    port: int
    pods: Callable[[], Awaitable[list[str]]]
    on_pod: Callable[[str], None] = lambda pod: None
    on_error: Callable[[str], None] = lambda why: None
    _pod: str = field(default="", init=False)
    _connections: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncGenerator[int]:
        """Forward what connects to this address. Yields the port. Raises `OSError` if it is taken."""
        server = await asyncio.start_server(self._accepted, sock=listen(host, port))
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for connection in tuple(self._connections):
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def check(self) -> None:
        """Connect once. Raises `ForwardError` or `KubeApiError`."""
        async with self._connected():
            pass

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # asyncio runs this in a task
        self._connections.add(task)
        try:
            async with self._connected() as stream:
                await _relay(reader, writer, stream)
        except (ForwardError, KubeApiError) as error:
            self.on_error(str(error))
        except (OSError, aiohttp.ClientError, asyncio.CancelledError):
            pass  # one side is gone, or the forwarding ends: close the other side
        finally:
            self._connections.discard(task)
            writer.close()

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[aiohttp.ClientWebSocketResponse]:
        """A stream to the pod of the connections before, if it is still there, else to the best other one."""
        pods = await self.pods()
        pods.sort(key=lambda pod: pod != self._pod)
        failure: KubeApiError | None = None
        for pod in pods:
            path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/portforward"
            try:
                stream = await self.api.websocket(path, {"ports": str(self.port)}, PROTOCOL)
            except KubeApiError as error:
                if error.cause is ApiFailureCause.FORBIDDEN:
                    right = f"get and create on pods/portforward in namespace {self.namespace}"
                    raise ForwardError(f"{error.message}: it takes the right to {right}") from None
                failure = error
                continue
            if pod != self._pod:
                self._pod = pod
                self.on_pod(pod)
            try:
                yield stream
            finally:
                await stream.close()
            return
        raise failure or ForwardError("there is no pod to forward to")


async def _relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: aiohttp.ClientWebSocketResponse
) -> None:
    """Pass bytes on in both directions until either side ends. Raises `ForwardError` if the kubelet says that it could
    not connect."""
    sending = asyncio.create_task(_send(reader, stream))
    try:
        await _receive(stream, writer)
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError, aiohttp.ClientError):
            await sending


async def _send(reader: asyncio.StreamReader, stream: aiohttp.ClientWebSocketResponse) -> None:
    while data := await reader.read(_CHUNK):
        await stream.send_bytes(bytes((_DATA,)) + data)
    await stream.close()


async def _receive(stream: aiohttp.ClientWebSocketResponse, writer: asyncio.StreamWriter) -> None:
    begun = {_DATA: False, _ERROR: False}
    async for message in stream:
        if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], message.data[1:]
        if channel not in begun:
            continue
        if not begun[channel]:
            begun[channel] = True  # the number of the port
        elif channel == _DATA:
            writer.write(data)
            await writer.drain()
        elif data:
            raise ForwardError(f"the kubelet could not connect: {data.decode(errors='replace').strip():.300}")
