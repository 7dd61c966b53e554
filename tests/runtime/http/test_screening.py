"""Requests that are turned away by their headers.

Covers: that the answer needs no byte of the body, what becomes of the body, and of the connection.
Not covered: orders of events that nobody thought of (test_connection_model.py), who is turned away
(tests/router/test_auth.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
from starlette.types import Receive, Scope, Send

from runtime.http.connection import LINGER, MOST_UNWANTED, ServerConnection
from runtime.http.context import ServerContext, ServerEvent
from runtime.http.limits import HttpLimits
from tests.virtual import FakeTransport, VirtualLoop

LIMITS = HttpLimits(max_body_bytes=1000, body_timeout=20, keep_alive=75, max_header_bytes=500)
GOOD = b"POST /good HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\nhi"


def bad(*headers: bytes, version: bytes = b"1.1") -> bytes:
    return b"\r\n".join([b"POST /bad HTTP/%b" % version, b"host: h", *headers, b"", b""])


class Server:
    """Turns away what is sent to /bad; answers others with their body."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.release = asyncio.Event()
        self.release.set()
        self.screened: list[str] = []
        self.refused: list[int] = []
        self.shared = ServerContext(self._app, LIMITS, on_refusal=self.refused.append, screen=self._screen)
        self.transport = FakeTransport(self.loop, ServerConnection(self.shared, self.loop), {})
        self.transport.protocol.connection_made(self.transport)

    def _screen(self, scope: Scope) -> bool:
        self.screened.append(scope["path"])
        return bool(scope["path"] != "/bad")

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await self.release.wait()
        status = 200 if scope["path"] == "/good" else 401
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]}
        )
        await send({"type": "http.response.body", "body": body})

    def send(self, *reads: bytes) -> bytes:
        """What the client gets for these reads."""
        before = len(self.transport.written)
        for data in reads:
            assert self.transport.receive(data)
            self.loop.settle()
        return self.transport.written[before:]

    def pour(self, size: int) -> int:
        """Send so many bytes, a segment at a time; how many were read."""
        read = 0
        while read < size and self.transport.receive(b"x" * 1000):
            read += 1000
            self.loop.settle()
        return read


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.release.set()
    made.transport.abort()
    made.loop.settle()
    assert (made.shared.in_flight, made.shared.body_bytes, made.shared.connections) == (0, 0, set())
    made.loop.close()


def test_the_answer_needs_no_byte_of_the_body(server: Server) -> None:
    answer = server.send(bad(b"content-length: 900"))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" not in answer
    assert (server.shared.in_flight, server.shared.body_bytes) == (0, 0)


def test_a_small_rest_is_read_past_and_the_connection_serves_on(server: Server) -> None:
    server.send(bad(b"content-length: %d" % MOST_UNWANTED))
    assert server.pour(MOST_UNWANTED // 1000 * 1000) == MOST_UNWANTED // 1000 * 1000
    assert server.shared.body_bytes == 0
    assert server.send(b"x" * (MOST_UNWANTED % 1000) + GOOD).endswith(b"\r\n\r\nhi")
    assert (server.screened, server.refused) == (["/bad", "/good"], [])


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(bad(b"content-length: %d" % (MOST_UNWANTED + 1)), id="large"),
        pytest.param(bad(b"content-length: %d" % 2**40), id="beyond the limit of bodies"),
        pytest.param(bad(b"transfer-encoding: chunked"), id="chunked"),
        pytest.param(bad(b"content-length: 9", b"expect: 100-continue"), id="not yet asked for"),
    ],
)
def test_what_cannot_be_read_past_is_hardly_read_and_closed(server: Server, head: bytes) -> None:
    answer = server.send(head)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert (server.transport.ended, server.transport.closing) == (True, False)  # nothing resets what is being read
    assert server.pour(10**7) <= MOST_UNWANTED + 1000
    server.loop.advance(LINGER + 0.1)
    assert server.transport.lost
    assert (server.screened, server.refused) == (["/bad"], [])


def test_what_is_sent_behind_such_a_body_is_no_request(server: Server) -> None:
    server.send(bad(b"transfer-encoding: chunked") + b"0\r\n\r\n" + GOOD, GOOD)
    assert server.transport.written.count(b"HTTP/1.1 ") == 1
    assert server.screened == ["/bad"]


def test_a_body_that_was_not_sent_when_the_connection_may_be_kept_is_waited_for_briefly(server: Server) -> None:
    server.send(bad(b"content-length: 900"))
    for _ in range(3):
        server.loop.advance(LINGER / 4)
        server.send(b"x")
    assert not server.transport.closing
    server.loop.advance(LINGER / 4 + 0.1)
    assert server.transport.lost
    assert server.refused == []


def test_without_a_body_nothing_is_unusual(server: Server) -> None:
    for head in (bad(), bad(b"content-length: 0"), bad(b"content-length: 0", b"expect: 100-continue")):
        answer = server.send(head)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" not in answer
    assert server.send(GOOD).endswith(b"hi")


def test_requests_in_a_row_are_answered_in_their_order(server: Server) -> None:
    server.release.clear()
    server.send(GOOD + bad(b"content-length: 3") + b"abc" + GOOD)
    assert server.transport.written == b""
    server.release.set()
    server.loop.settle()
    assert re.findall(rb"HTTP/1\.1 (\d+)", server.transport.written) == [b"200", b"401", b"200"]


def test_a_large_one_behind_a_request_under_way_waits_for_its_turn(server: Server) -> None:
    server.release.clear()
    server.send(GOOD + bad(b"content-length: %d" % 2**30))
    assert server.transport.paused
    server.release.set()
    server.loop.settle()
    assert server.transport.written.count(b"HTTP/1.1 ") == 2
    assert server.transport.ended
    assert server.pour(10**6) <= MOST_UNWANTED + 1000
    server.loop.advance(LINGER + 0.1)
    assert server.transport.lost


@pytest.mark.parametrize("headers", [(b"connection: close",), ()], ids=["asked for", "draining"])
def test_a_last_request_ends_once_its_body_has_passed(server: Server, headers: tuple[bytes, ...]) -> None:
    if not headers:
        server.shared.advance(ServerEvent.DRAIN)
    answer = server.send(bad(b"content-length: 4", *headers))
    assert b"\r\nconnection: close\r\n" in answer
    assert not server.transport.closing
    server.send(b"body")
    server.loop.advance(LINGER + 0.1)
    assert server.transport.lost


def test_a_client_of_http_1_0_is_answered_too(server: Server) -> None:
    answer = server.send(bad(b"content-length: 4", version=b"1.0"), b"body")
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_an_offer_of_another_protocol_is_screened_once(server: Server) -> None:
    server.send(bad(b"connection: upgrade", b"upgrade: h2c", b"content-length: 2") + b"hi" + GOOD)
    assert server.screened == ["/bad", "/good"]
    assert server.transport.written.endswith(b"hi")


def test_whose_key_is_good_is_asked_for_the_body(server: Server) -> None:
    expecting = GOOD.replace(b"\r\n\r\nhi", b"\r\nexpect: 100-continue\r\n\r\n")
    assert server.send(expecting) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert server.send(b"hi").endswith(b"hi")
