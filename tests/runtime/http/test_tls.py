"""TLS at a server's port, over real sockets on loopback, with certificates of an authority of the test's own.

Covers: requests, client certificates, what fails in a handshake, their bound, and a certificate that changes. Not
covered: the files that certificates are read from (tests/runtime/test_tls.py), the router (tests/router/test_tls.py).
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trustme
from starlette.types import Receive, Scope, Send

from runtime.http.server import HttpServer
from runtime.sockets import listen
from runtime.tls_listener import CLIENT_IDENTITY, HandshakeFailure, TlsPort, identity
from tests.runtime.http.test_server import answer, read_answer, until

GET = b"GET /x HTTP/1.1\r\nhost: h\r\n\r\n"
CA, OTHER_CA = trustme.CA(), trustme.CA()
FIRST, SECOND = CA.issue_cert("localhost"), CA.issue_cert("localhost")


def server_context(certificate: trustme.LeafCert = FIRST, clients: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    if clients is not None:
        clients.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(certificate: trustme.LeafCert | None = None, trusted: trustme.CA = CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusted.configure_trust(context)
    if certificate is not None:
        certificate.configure_cert(context)
    return context


class Bench:
    """A TLS server that counts, and answers with the scheme, the client's identity and the body's length."""

    def __init__(self, context: ssl.SSLContext, timeout: float, max_handshakes: int) -> None:
        self.context = context
        self.failures: Counter[HandshakeFailure] = Counter()
        self.versions: list[str] = []
        self.refused: list[int] = []
        port = TlsPort(lambda: self.context, timeout, max_handshakes, self.versions.append, self._failed)
        self.server = HttpServer(self._answer, listen("127.0.0.1", 0), on_refusal=self.refused.append, tls=port)

    def _failed(self, failure: HandshakeFailure) -> None:
        self.failures[failure] += 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await answer(send, f"{scope['scheme']} {scope['extensions'][CLIENT_IDENTITY]} {len(body)}".encode())

    async def open(self, context: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name = "localhost" if context is not None else None
        return await asyncio.open_connection("127.0.0.1", self.server.port, ssl=context, server_hostname=name)

    async def ask(self, context: ssl.SSLContext | None = None, request: bytes = GET) -> tuple[int, bytes]:
        reader, writer = await self.open(context)
        writer.write(request)
        try:
            status, _, body = await read_answer(reader)
            return status, body
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    context: ssl.SSLContext | None = None, *, timeout: float = 5.0, max_handshakes: int = 64
) -> AsyncIterator[Bench]:
    bench = Bench(context or server_context(), timeout, max_handshakes)
    await bench.server.start()
    try:
        yield bench
    finally:
        await bench.server.stop(0)
    await until(lambda: bench.server.connections == 0)


async def test_requests_of_any_size_are_served_on_a_connection_that_stays() -> None:
    body = os.urandom(1_000_000)
    async with serving() as bench:
        reader, writer = await bench.open(client_context())
        for size in (0, len(body)):
            writer.write(b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % size + body[:size])
            status, _, answered = await read_answer(reader)
            assert (status, answered) == (200, f"https  {size}".encode())
        assert bench.versions == ["TLSv1.3"]
        writer.close()


async def test_what_breaks_a_limit_is_answered_over_tls_too() -> None:
    async with serving() as bench:
        assert (await bench.ask(client_context(), b"GET /x HTTP/9.9\r\nhost: h\r\n\r\n"))[0] in (400, 505)


async def test_plain_http_is_told_to_use_https() -> None:
    async with serving() as bench:
        reader, writer = await bench.open(None)
        writer.write(GET + b"further bytes that nobody reads")
        status, headers, body = await read_answer(reader)
        assert (status, headers["connection"]) == (400, "close")
        assert b"https://" in body
        assert await reader.read() == b""
        writer.close()
        assert bench.refused == [400]
        assert bench.failures == {HandshakeFailure.PLAIN_HTTP: 1}


async def test_the_certificate_of_a_handshake_is_the_one_that_is_current() -> None:
    async with serving() as bench:
        reader, writer = await bench.open(client_context())
        before = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        bench.context = server_context(SECOND)
        _, later = await bench.open(client_context())
        assert later.get_extra_info("ssl_object").getpeercert(binary_form=True) != before
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200  # connections that are open stay
        writer.close()
        later.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_needs_a_certificate_of_an_accepted_authority(version: ssl.TLSVersion) -> None:
    async with serving(server_context(clients=CA)) as bench:

        async def ask(certificate: trustme.LeafCert | None) -> tuple[int, bytes]:
            context = client_context(certificate)
            context.maximum_version = version
            return await bench.ask(context)

        assert await ask(CA.issue_cert("search", common_name="search")) == (200, b"https search 0")
        for wrong in (None, OTHER_CA.issue_cert("search")):
            with pytest.raises((OSError, asyncio.IncompleteReadError)):  # with TLS 1.3 the client learns of it late
                await ask(wrong)
        await until(lambda: bench.failures == {HandshakeFailure.CLIENT_CERTIFICATE: 2})


def _old() -> ssl.SSLContext:
    context = client_context()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def distrusting(port: int) -> None:
    """asyncio's clients leave without the alert that others send."""
    with socket.create_connection(("127.0.0.1", port)) as sock, pytest.raises(ssl.SSLCertVerificationError):
        client_context(trusted=OTHER_CA).wrap_socket(sock, server_hostname="localhost")


async def test_a_handshake_that_fails_is_counted_by_why() -> None:
    async with serving(timeout=0.3) as bench:
        with pytest.raises(OSError):  # noqa: PT011  which one depends on the version of OpenSSL
            await bench.open(_old())
        await asyncio.to_thread(distrusting, bench.server.port)
        writers = []
        for first, leaves in (
            (b"\0garbage", True),
            (b"\x16\x03\x01", True),
            (b"", True),
            (b"\x16", False),
            (b"", False),
        ):
            _, writer = await bench.open(None)
            writers.append(writer)
            writer.write(first)
            if leaves:
                writer.close()
        await until(lambda: bench.failures.total() >= 6)
        assert bench.failures == {
            HandshakeFailure.PROTOCOL: 2,
            HandshakeFailure.REFUSED: 1,
            HandshakeFailure.LEFT: 1,  # the one that said nothing does not count
            HandshakeFailure.TIMEOUT: 2,
        }
        for writer in writers:
            writer.close()


async def test_connections_that_say_nothing_keep_nobody_out() -> None:
    async with serving(timeout=60, max_handshakes=4) as bench:
        silent = [await bench.open(None) for _ in range(20)]
        assert (await bench.ask(client_context()))[0] == 200
        assert bench.failures == {HandshakeFailure.DISPLACED: 17}
        for _, writer in silent:
            writer.close()


async def test_a_handshake_that_has_begun_when_the_server_stops_is_finished_and_answered() -> None:
    async with serving() as bench:
        reader, writer = await bench.open(None)
        await until(lambda: bool(bench.server.handshakes))
        stopping = asyncio.create_task(bench.server.stop(5))
        await asyncio.sleep(0)
        await writer.start_tls(client_context(), server_hostname="localhost")
        writer.write(GET)
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        await stopping


@pytest.mark.parametrize(
    ("certificate", "named"),
    [
        pytest.param({}, "", id="no certificate"),
        pytest.param({"subject": ((("organizationName", "o"),), (("commonName", "cn"),))}, "cn", id="common name"),
        pytest.param(
            {"subject": ((("commonName", "cn"),),), "subjectAltName": (("DNS", "d"), ("URI", "spiffe://a/b"))},
            "spiffe://a/b",
            id="URI first",
        ),
        pytest.param({"subject": (), "subjectAltName": (("DNS", "d"),)}, "d", id="nothing but a DNS name"),
    ],
)
def test_whom_a_certificate_names(certificate: dict[str, object], named: str) -> None:
    assert identity(certificate) == named
