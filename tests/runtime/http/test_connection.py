"""A client's connection step by step.

Covers: what one read leaves behind for the next, time-outs and limits, on virtual time over a transport in memory.
Not covered: orders of events that nobody thought of (test_connection_model.py), sockets (test_server.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from starlette.types import Receive, Scope, Send

from runtime.http.connection import ServerConnection
from runtime.http.context import ServerContext
from runtime.http.limits import HttpLimits
from tests.virtual import FakeTransport, VirtualLoop

GET = b"GET /x HTTP/1.1\r\nhost: h\r\n\r\n"
LIMITS = HttpLimits(header_timeout=10, body_timeout=20, keep_alive=75, max_body_bytes=100, max_total_body_bytes=150)


class Server:
    """An app that answers a request with its body (or path) when `release` is set, and connections to it."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.release = asyncio.Event()
        self.release.set()
        self.scopes: list[Scope] = []
        self.refused: list[int] = []
        self.shared = ServerContext(
            self._app,
            LIMITS,
            on_refusal=self.refused.append,
            refusal_headers=lambda headers: [(b"x-seen", b"%d" % len(headers))],
        )

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        body = (await receive())["body"] or scope["path"].encode()
        await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    def connect(self) -> FakeTransport:
        connection = ServerConnection(self.shared, self.loop)
        transport = FakeTransport(self.loop, connection, {"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)})
        connection.connection_made(transport)
        return transport

    def send(self, transport: FakeTransport, *reads: bytes) -> bytes:
        """What the client gets for these reads."""
        before = len(transport.written)
        for data in reads:
            assert transport.receive(data)
            self.loop.settle()
        return transport.written[before:]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.release.set()
    for connection in list(made.shared.connections):
        connection.abort()
    made.loop.settle()
    assert (made.shared.in_flight, made.shared.body_bytes) == (0, 0)
    made.loop.close()


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "under-way"])
def test_a_head_that_begins_behind_another_request_has_its_time_too(server: Server, answered: bool) -> None:
    transport = server.connect()
    if not answered:
        server.release.clear()
    server.send(transport, GET + b"GET /slow HTTP/1.1\r\nho")
    server.loop.advance(LIMITS.header_timeout + 1)
    assert server.refused == [408]
    server.release.set()
    server.loop.advance(3)
    assert transport.lost


def test_a_drip_of_bytes_does_not_lengthen_the_time_of_a_head(server: Server) -> None:
    transport = server.connect()
    server.send(transport, GET + b"GET /")
    for _ in range(9):
        server.loop.advance(1)
        server.send(transport, b"e")
    server.loop.advance(1.1)
    assert server.refused == [408]


def test_a_head_does_not_time_out_while_it_is_not_read(server: Server) -> None:
    transport = server.connect()
    server.release.clear()
    server.send(transport, GET + GET + b"GET /third HTTP/1.1\r\nho")
    assert transport.paused
    server.loop.advance(LIMITS.header_timeout * 10)
    server.release.set()
    server.loop.settle()
    assert server.send(transport, b"st: h\r\n\r\n").endswith(b"\r\n\r\n/third")
    assert server.refused == []


def test_connect_is_refused(server: Server) -> None:
    transport = server.connect()
    answer = server.send(transport, b"CONNECT h:443 HTTP/1.1\r\nhost: h:443\r\n\r\n\x16\x03\x01")
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert server.scopes == []


def test_a_refused_request_is_counted_off_once(server: Server) -> None:
    transport = server.connect()
    server.release.clear()
    server.send(transport, GET, b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nhalf")
    assert server.shared.in_flight == 2
    server.loop.advance(LIMITS.body_timeout + 1)
    assert (server.refused, server.shared.in_flight, server.shared.body_bytes) == ([408], 1, 0)
    server.send(transport, b"garbage\r\n\r\n")
    server.loop.advance(LIMITS.body_timeout * 3)
    assert (server.refused, server.shared.in_flight) == ([408], 1)


OFFER = b"POST /%b HTTP/1.1\r\nhost: h\r\nconnection: %b\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nhi"


def test_an_offer_to_upgrade_keeps_what_else_its_connection_header_says(server: Server) -> None:
    transport = server.connect()
    answer = server.send(transport, OFFER % (b"a", b"Upgrade, close"))
    assert b"\r\nconnection: close\r\n" in answer
    assert answer.endswith(b"\r\n\r\nhi")
    assert transport.closing


def test_offers_to_upgrade_can_be_pipelined(server: Server) -> None:
    transport = server.connect()
    answer = server.send(transport, OFFER % (b"a", b"upgrade") + OFFER % (b"b", b"upgrade, http2-settings"))
    assert answer.count(b"\r\n\r\nhi") == 2
    assert [scope["path"] for scope in server.scopes] == ["/a", "/b"]
    assert not transport.closing


def test_what_follows_a_last_request_is_not_read(server: Server) -> None:
    transport = server.connect()
    server.release.clear()
    server.send(transport, b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n" + GET)
    server.send(transport, b"and more")
    server.release.set()
    server.loop.settle()
    assert transport.written.count(b"HTTP/1.1 ") == 1
    assert (server.refused, transport.lost) == ([], True)


def test_trailers_are_no_headers(server: Server) -> None:
    chunks = b"2\r\nhi\r\n0\r\nauthorization: forged\r\n\r\n"
    server.send(server.connect(), b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
    assert server.scopes[0]["headers"] == [(b"transfer-encoding", b"chunked")]


CHUNKED = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("begun", [b"0\r\nx: ", b"0\r\nx", b"2;"], ids=["trailer", "name-of-a-trailer", "extension"])
def test_what_belongs_to_no_body_is_bounded_within_one_too(server: Server, begun: bytes) -> None:
    transport = server.connect()
    server.send(transport, CHUNKED + b"2\r\nhi\r\n", begun)
    for _ in range(2 * LIMITS.max_header_bytes // 10_000):
        server.send(transport, b"a" * 10_000)
    assert server.refused == []
    assert server.send(transport, b"a" * 20_000).startswith(b"HTTP/1.1 431 ")


def test_a_body_in_many_small_chunks_is_no_surplus(server: Server) -> None:
    transport = server.connect()
    server.send(transport, CHUNKED)
    extension = b";" + b"a" * 10_000
    for _ in range(50):
        server.send(transport, b"2" + extension, b"\r\n", b"hi\r\n")
    assert server.send(transport, b"0\r\n\r\n").endswith(b"hi" * 50)


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
def test_other_versions_of_http_are_refused(server: Server, version: bytes) -> None:
    answer = server.send(server.connect(), b"GET / HTTP/%b\r\nhost: h\r\n\r\n" % version)
    assert answer.startswith(b"HTTP/1.1 505 ")
    assert server.scopes == []


def test_a_client_of_http_1_0_gets_no_interim_answer(server: Server) -> None:
    head = b"POST / HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
    assert server.send(server.connect(), head, b"hi").startswith(b"HTTP/1.1 200 ")


def test_an_offer_to_upgrade_does_not_make_a_client_of_http_1_0_one_of_1_1(server: Server) -> None:
    server.send(server.connect(), b"GET / HTTP/1.0\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
    assert [scope["http_version"] for scope in server.scopes] == ["1.0"]


@pytest.mark.parametrize("target", [b"*", b"http://h/x?q", b"/x?q#f", b"/x%41"])
def test_targets_in_every_form(server: Server, target: bytes) -> None:
    server.send(server.connect(), b"OPTIONS %s HTTP/1.1\r\nhost: h\r\n\r\n" % target)
    scope = server.scopes[0]
    expected = {b"*": ("*", b""), b"http://h/x?q": ("/x", b"q"), b"/x?q#f": ("/x", b"q"), b"/x%41": ("/xA", b"")}
    assert (scope["path"], scope["query_string"]) == expected[target]


def post(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % size


def test_the_bodies_of_all_clients_together_are_bounded(server: Server) -> None:
    server.release.clear()
    first, second, third = (server.connect() for _ in range(3))
    server.send(first, post(90), b"x" * 50, b"x" * 40)
    server.send(second, post(60), b"x" * 30)
    assert server.shared.body_bytes == 120
    refused = server.send(third, post(40))
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in refused
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == 503
    server.send(second, b"x" * 30)
    assert server.shared.body_bytes == 150  # what was announced fits as long as nobody else sends it first
    server.release.set()
    server.loop.settle()
    assert (server.shared.body_bytes, server.shared.in_flight) == (0, 0)
    assert first.written.endswith(b"x" * 90)
    assert server.send(server.connect(), post(100), b"y" * 100).endswith(b"y" * 100)


def test_a_body_that_grows_beyond_the_room_that_is_left_is_refused_as_it_comes(server: Server) -> None:
    server.release.clear()
    first, second = server.connect(), server.connect()
    server.send(first, post(100), b"x" * 60)
    server.send(second, post(90), b"x" * 80)
    assert server.shared.body_bytes == 140
    assert server.send(first, b"x" * 20).startswith(b"HTTP/1.1 503 ")
    assert server.shared.body_bytes == 80


def test_a_refusal_carries_what_the_headers_ask_for(server: Server) -> None:
    assert b"\r\nx-seen: 2\r\n" in server.send(server.connect(), post(101))
    assert b"\r\nx-seen: 0\r\n" in server.send(server.connect(), b"garbage\r\n\r\n")
