"""The node's network: loopback addresses, the Service proxy, and the API server's address as pods see it.

Played: ClusterIPs and their ports (by turns to ready endpoints, else to those that still serve while they end), and the
Service `kubernetes` with TLS. Not played: NetworkPolicies, DNS, UDP, session affinity, node ports, load balancers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import random
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import trustme

from tests.kube.kubelet.api import ENDPOINT_SLICES, SERVICES, Api, Key, Object, key_of
from tests.kube.kubelet.endpoints import SERVICE_NAME, is_headless

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
CHUNK = 65_536
HTTPS = 443
LOCK_PORT = 47_999
NETWORKS = 128, 255
"""The second numbers of the networks, the last excluded. Those below are of tests that name an address themselves."""
TRIES = 500

Backend = tuple[str, int]
Table = Mapping[int, tuple[Backend, ...]]
"""Where connections to each port of a Service may go."""
Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


def backends(slices: Iterable[Mapping[str, Any]], port_name: str) -> tuple[Backend, ...]:
    """Where connections to this port of a Service may go: ready pods, else those that still serve while they end."""
    ready, serving = set(), set()
    for item in slices:
        numbers = [port["port"] for port in item.get("ports") or () if (port.get("name") or "") == port_name]
        for endpoint, number in itertools.product(item.get("endpoints") or (), numbers):
            state, address = endpoint.get("conditions") or {}, (endpoint["addresses"][0], number)
            # What is not said counts as ready, and as serving what it is ready for.
            if state.get("ready", True):
                ready.add(address)
            elif state.get("serving") and state.get("terminating"):
                serving.add(address)
    return tuple(sorted(ready or serving))


@dataclass(slots=True)
class _Port:
    """One port of a Service: it listens while there is a pod to forward to, so that else it refuses."""

    targets: tuple[Backend, ...] = ()
    turn: int = 0
    server: asyncio.Server | None = None


class ServiceProxy:
    """Gives every Service that is not headless an address of its own on this machine and serves it.

    A change of the slices takes effect `delay` seconds later, as on a real node; connections that stand are left alone.
    """

    def __init__(self, api: Api, loopback: Loopback, delay: float, spawn: Spawn) -> None:
        self._api = api
        self._loopback = loopback
        self._delay = delay
        self._spawn = spawn
        self._addresses: dict[Key, str] = {}
        self._ports: dict[tuple[Key, int], _Port] = {}
        self._updates: asyncio.Queue[tuple[float, Key, Table]] = asyncio.Queue()
        api.on_change(SERVICES, lambda item, _: self._changed(key_of(item)))
        api.on_change(ENDPOINT_SLICES, self._on_slice)

    def address(self, key: Key) -> str:
        """The address at which this Service is reached (once it exists)."""
        if key not in self._addresses:
            self._addresses[key] = self._loopback.service()
        return self._addresses[key]

    def _on_slice(self, item: Object, exists: bool) -> None:
        service = (item["metadata"].get("labels") or {}).get(SERVICE_NAME)
        if service:
            self._changed((item["metadata"]["namespace"], service))

    def _changed(self, key: Key) -> None:
        due = asyncio.get_running_loop().time() + self._delay
        self._updates.put_nowait((due, key, self._table(key)))

    def _table(self, key: Key) -> Table:
        """Pods by port of the Service, as the API server has them now."""
        service = self._api.get(SERVICES, key)
        if service is None or is_headless(service):
            return {}
        slices = [
            each
            for each in self._api.all(ENDPOINT_SLICES)
            if (each["metadata"].get("labels") or {}).get(SERVICE_NAME) == key[1]
            and each["metadata"]["namespace"] == key[0]
        ]
        return {port["port"]: backends(slices, port.get("name", "")) for port in service["spec"].get("ports") or ()}

    async def run(self) -> None:
        """Applies changes, each after its delay, until it is cancelled."""
        try:
            while True:
                due, key, table = await self._updates.get()
                await asyncio.sleep(due - asyncio.get_running_loop().time())
                await self._apply(key, table)
        finally:
            for port in self._ports.values():
                _close(port)

    async def _apply(self, key: Key, table: Table) -> None:
        for known, number in list(self._ports):
            if known == key and number not in table:
                _close(self._ports.pop((known, number)))
        for number, targets in table.items():
            port = self._ports.setdefault((key, number), _Port())
            port.targets = targets
            if not targets:
                _close(port)
            elif port.server is None:
                await self._listen(key, number, port)

    async def _listen(self, key: Key, number: int, port: _Port) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            targets = port.targets
            port.turn += 1
            target = targets[port.turn % len(targets)] if targets else None
            task = self._spawn(_join(target, reader, writer), f"connection to {key[1]}:{number}")
            # Also when the task is cancelled before it has begun.
            task.add_done_callback(lambda _: writer.close())

        try:
            port.server = await _serve(accept, self.address(key), number)
        except OSError as error:
            # Ports below 1024 may be denied to us; nobody can connect then, and the test that tries sees why.
            logger.error("Service %s/%s: cannot listen on port %d: %s", *key, number, error)


async def _serve(accept: Accept, address: str, number: int, context: ssl.SSLContext | None = None) -> asyncio.Server:
    """Listens. `asyncio.start_server` by itself leaves its socket open if it is cancelled."""
    sock = socket.create_server((address, number), backlog=1024)
    try:
        return await asyncio.start_server(accept, sock=sock, ssl=context, backlog=1024)
    except BaseException:
        sock.close()
        raise


def _close(port: _Port) -> None:
    if port.server is not None:
        port.server.close()
        port.server = None


class FrontDoor:
    """The Service `kubernetes`: ends TLS at an address of the node's and passes on to the API server's plain HTTP."""

    def __init__(self, address: str, api_url: str, spawn: Spawn) -> None:
        self.address = address
        self._spawn = spawn
        upstream = urlsplit(api_url)
        assert upstream.hostname is not None
        assert upstream.port is not None
        self._upstream = upstream.hostname, upstream.port
        authority = trustme.CA()
        self.certificate = authority.cert_pem.bytes()
        """Of the authority, PEM."""
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(address, "kubernetes.default.svc").configure_cert(self._context)

    async def run(self) -> None:
        """Serves until it is cancelled."""

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._spawn(_join(self._upstream, reader, writer), "connection to the API server")
            task.add_done_callback(lambda _: writer.close())

        server = await _serve(accept, self.address, HTTPS, self._context)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()


async def _join(target: Backend | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Joins a new connection to the target. Where that refuses, the client's connection is reset."""
    ends = [writer]
    try:
        if target is not None:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                upstream, sink = await asyncio.open_connection(*target)
            ends.append(sink)
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, sink))
                group.create_task(_copy(upstream, writer))
    except* OSError:
        # One side is gone; the other one hears of it by a reset, as it would without us.
        for each in ends:
            each.transport.abort()
    finally:
        for each in ends:
            each.close()
        for each in ends:
            with contextlib.suppress(OSError):
                await each.wait_closed()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK):
        writer.write(chunk)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()  # TLS knows no half-closed connection


class Loopback:
    """127.x.0.0/16 with a random x that nobody else has: .0.1 up for pods, .128.1 up for Services.

    A listening socket on the last address of the network, which is also the node's, holds it until `close`.
    """

    def __init__(self) -> None:
        for _ in range(TRIES):
            network = f"127.{random.randrange(*NETWORKS)}"
            try:
                self._lock = socket.create_server((f"{network}.255.254", LOCK_PORT))
            except OSError:
                continue
            self.node_ip = f"{network}.255.254"
            self._pods = _addresses(f"{network}.0.0/17")
            self._services = _addresses(f"{network}.128.0/18")
            return
        raise RuntimeError(f"no network 127.x.0.0/16 of {TRIES} tried is free: are there that many nodes here?")

    def pod(self) -> str:
        """An address no pod has had."""
        return next(self._pods)

    def service(self) -> str:
        """An address no Service has had."""
        return next(self._services)

    def close(self) -> None:
        """Gives the network back."""
        self._lock.close()


def _addresses(network: str) -> Iterator[str]:
    # Some programs take addresses that end in .0 or .255 for those of a network.
    return (str(each) for each in ipaddress.ip_network(network).hosts() if int(each) & 0xFF not in (0, 255))
