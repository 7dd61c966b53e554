"""The Service `kubernetes`: the API server's address as pods see it, over TLS, with a certificate of the node's own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from urllib.parse import urlsplit

import trustme

PORT = 443
CHUNK = 65_536


class FrontDoor:
    """Terminates TLS at an address of the node's and passes on to the API server, which speaks plain HTTP here."""

    def __init__(self, address: str, api_url: str) -> None:
        self.address = address
        self._upstream = urlsplit(api_url)
        authority = trustme.CA()
        self.certificate = authority.cert_pem.bytes()
        """Of the authority, PEM."""
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(address, "kubernetes.default.svc").configure_cert(self._context)
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves until it is cancelled."""
        server = await asyncio.start_server(self._accept, self.address, PORT, ssl=self._context, backlog=1024)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            for task in tuple(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            upstream, sink = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
            ends.append(sink)
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, sink))
                group.create_task(_copy(upstream, writer))
        except* (OSError, ssl.SSLError):
            pass
        finally:
            # The end of one side is the end of both: TLS knows no half-closed connection.
            for each in ends:
                each.close()
            for each in ends:
                with contextlib.suppress(OSError):
                    await each.wait_closed()


class _EndOfStreamError(OSError):
    """One side has closed."""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK):
        writer.write(chunk)
        await writer.drain()
    raise _EndOfStreamError
