"""Bounded serving, over real sockets on loopback.

Covers: limits, time-outs, disconnects, and stopping. Not covered: TLS and HTTP/2, which the server does not speak;
speed (bench/).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from starlette.types import Receive, Scope, Send

from runtime.http.request import ClientDisconnected
from runtime.http.server import HttpLimits, HttpServer
from runtime.sockets import inherited, listen

GET = b"GET /x HTTP/1.1\r\nhost: h\r\n\r\n"


async def answer(send: Send, body: bytes = b"ok", status: int = 200) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    assert message["more_body"] is False
    await answer(send, message["body"] or scope["path"].encode())


@asynccontextmanager
async def serving(
    app: Callable[[Scope, Receive, Send], Awaitable[None]] = echo,
    limits: HttpLimits | None = None,
    *,
    cancel_on_disconnect: bool = False,
) -> AsyncIterator[HttpServer]:
    server = HttpServer(app, listen("127.0.0.1", 0), limits, cancel_on_disconnect=cancel_on_disconnect)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)
    assert server.in_flight == 0
    await until(lambda: server.connections == 0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nothing to wait on: the condition is a count
            await asyncio.sleep(0.002)


async def connect(server: HttpServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status, *lines = head.rstrip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else b""
    return int(status.split()[1]), headers, body


async def exchange(server: HttpServer, *parts: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send `parts` on a connection of their own, read one answer and the end of the connection if it says so."""
    reader, writer = await connect(server)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0)
        status, headers, body = await read_answer(reader)
        if headers.get("connection") == "close":
            assert await reader.read() == b""
        return status, headers, body
    finally:
        writer.close()
        await writer.wait_closed()


def error(body: bytes) -> dict[str, object]:
    found = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


async def test_keep_alive_serves_several_requests_on_one_connection() -> None:
    async with serving() as server:
        reader, writer = await connect(server)
        for path in (b"/a", b"/b"):
            writer.write(b"GET %s HTTP/1.1\r\nhost: h\r\n\r\n" % path)
            status, headers, body = await read_answer(reader)
            assert (status, body) == (200, path)
            assert headers["server"] == "uvicorn"
            assert "date" in headers
        assert server.connections == 1
        writer.close()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as server:
        reader, writer = await connect(server)
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: h\r\n\r\n" % n for n in range(20)))
        assert [(await read_answer(reader))[2] for _ in range(20)] == [b"/%d" % n for n in range(20)]
        writer.close()


async def test_the_body_arrives_whole_however_it_is_sent() -> None:
    async with serving() as server:
        pieces = [b"ab", b"c" * 100_000, b"d"]
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        head = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
        assert (await exchange(server, head, chunked))[2] == b"".join(pieces)
        head = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 6\r\n\r\n"
        assert (await exchange(server, head, b"abc", b"def"))[2] == b"abcdef"


async def test_expect_100_continue() -> None:
    async with serving() as server:
        reader, writer = await connect(server)
        writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await read_answer(reader))[2] == b"hi"
        writer.close()


async def test_an_offer_to_upgrade_is_declined_and_the_request_served() -> None:
    async with serving() as server:
        offer = b"POST /u HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nhi"
        assert (await exchange(server, offer))[::2] == (200, b"hi")


@pytest.mark.parametrize(
    ("request_bytes", "status", "says"),
    [
        (b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(10_000)) + b"\r\n", 431, "256 headers"),
        (b"GET / HTTP/1.1\r\nlong: " + b"x" * 70_000 + b"\r\n\r\n", 431, "65536 bytes"),
        (b"GET / HTTP/1.1\r\nlong: " + b"x" * 900_000, 431, "65536 bytes"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 431, "65536 bytes"),
        (b"POST / HTTP/1.1\r\ncontent-length: 1001\r\n\r\n", 413, "1000 bytes"),
        (b"POST / HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1_000_000, 413, "1000 bytes"),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, 413, "1000 bytes"),
        (b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400, "Invalid HTTP"),
        (b"\x16\x03\x01 not HTTP at all\r\n\r\n", 400, "Invalid HTTP"),
    ],
    ids=["count", "one-large", "unfinished", "url", "declared", "sent", "chunked", "length", "garbage"],
)
async def test_what_breaks_a_bound_is_answered_and_closed(request_bytes: bytes, status: int, says: str) -> None:
    async with serving(limits=HttpLimits(max_body_bytes=1000)) as server:
        got, headers, body = await exchange(server, request_bytes)
        assert got == status
        assert headers["connection"] == "close"
        assert error(body)["code"] == status
        assert says in str(error(body)["message"])
        assert server.in_flight == 0
        assert (await exchange(server, GET))[0] == 200


@pytest.mark.parametrize("part", [b"GET / HTTP/1.1\r\nho", b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nhalf"])
async def test_half_a_request_then_silence_is_408(part: bytes) -> None:
    async with serving(limits=HttpLimits(header_timeout=0.05, body_timeout=0.05)) as server:
        status, _, body = await exchange(server, part)
        assert status == 408
        assert error(body)["type"] == "RequestTimeout"
        assert server.in_flight == 0


async def test_idle_connections_are_closed_without_a_word() -> None:
    async with serving(limits=HttpLimits(keep_alive=0.05)) as server:
        reader, writer = await connect(server)
        assert await reader.read() == b""
        writer.close()
        # Sent before the event loop goes on: however long that takes, the connection is not idle yet.
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(GET)
        reader, writer = await asyncio.open_connection(sock=client)
        await read_answer(reader)
        assert await reader.read() == b""
        writer.close()


async def test_too_many_requests_at_once_are_refused_with_retry_after() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await answer(send)

    async with serving(slow, HttpLimits(max_concurrent_requests=2)) as server:
        running = [asyncio.create_task(exchange(server, GET)) for _ in range(2)]
        await until(lambda: server.in_flight == 2)
        status, headers, body = await exchange(server, GET)
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert "busy" in str(error(body)["message"])
        release.set()
        assert [(await task)[0] for task in running] == [200, 200]
        await until(lambda: server.in_flight == 0)
        assert (await exchange(server, GET))[0] == 200


async def test_garbage_behind_a_request_under_way_does_not_break_its_answer() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await answer(send, b"whole")

    async with serving(slow) as server:
        reader, writer = await connect(server)
        writer.write(GET + b"garbage\r\n\r\n")
        await until(lambda: server.in_flight == 1)
        release.set()
        assert (await read_answer(reader))[2] == b"whole"
        assert await reader.read() == b""
        writer.close()


async def test_a_client_that_never_reads_is_dropped_and_the_app_told() -> None:
    told = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        except OSError:
            told.set()
            raise

    async with serving(endless, HttpLimits(write_timeout=0.1)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(GET)
            async with asyncio.timeout(10):
                await told.wait()
        await until(lambda: server.in_flight == 0)


async def test_a_large_answer_left_unread_does_not_hold_the_connection() -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"x" * 30_000_000)

    async with serving(large, HttpLimits(write_timeout=0.1)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(GET)
            await until(lambda: server.connections == 1)
            await until(lambda: server.connections == 0)


@pytest.mark.parametrize("cancel", [False, True])
async def test_the_app_learns_that_the_client_left(cancel: bool) -> None:
    learned = asyncio.Event()

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if cancel:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                learned.set()
                raise
        assert (await receive())["type"] == "http.disconnect"
        learned.set()

    async with serving(waiting, cancel_on_disconnect=cancel) as server:
        _, writer = await connect(server)
        writer.write(GET)
        await until(lambda: server.in_flight == 1)
        writer.close()
        async with asyncio.timeout(10):
            await learned.wait()
        await until(lambda: server.in_flight == 0)


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), ClientDisconnected("another one left")], ids=repr)
async def test_an_app_that_fails_costs_one_request_and_no_traceback(
    raised: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise raised

    async with serving(failing) as server:
        status, _, body = await exchange(server, GET)
        assert status == 500
        assert error(body) == {
            "message": "Internal Server Error", "type": "InternalServerError", "param": None, "code": 500,
        }  # fmt: skip
        reader, writer = await connect(server)
        writer.write(b"GET /late HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await reader.read()).endswith(b"1\r\nx\r\n")  # cut: the last chunk is missing
        writer.close()
    assert [record.getMessage() for record in caplog.records] == ["app_failed", "app_failed"]
    assert all(record.exc_info is None for record in caplog.records)


async def test_stop_finishes_answers_under_way_and_refuses_new_connections() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await release.wait()
        await answer(send)

    server = HttpServer(slow, listen("127.0.0.1", 0))
    await server.start()
    running = asyncio.create_task(exchange(server, b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n"))
    idle_reader, idle_writer = await connect(server)
    idle_writer.write(GET)
    await read_answer(idle_reader)
    await until(lambda: server.in_flight == 1)
    stopping = asyncio.create_task(server.stop(10))
    await asyncio.sleep(0)
    idle_writer.write(GET)  # idle connections are still open: the request is served, and told to close
    assert (await read_answer(idle_reader))[1]["connection"] == "close"
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await connect(server)
    release.set()
    assert (await running)[:2][0] == 200
    await stopping
    assert (server.in_flight, server.connections) == (0, 0)
    idle_writer.close()


async def test_stop_cuts_what_outlives_the_grace_period() -> None:
    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    server = HttpServer(stuck, listen("127.0.0.1", 0))
    await server.start()
    running = asyncio.create_task(exchange(server, GET))
    await until(lambda: server.in_flight == 1)
    await server.stop(0.01)
    status, headers, body = await running
    assert status == 503
    assert error(body)["type"] == "ServiceUnavailableError"
    assert "retry-after" in headers
    await until(lambda: server.connections == 0)


async def test_an_answer_without_a_length_to_a_client_that_knows_no_chunks() -> None:
    async def pieces(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"b"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    async with serving(pieces) as server:
        reader, writer = await connect(server)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body == b"ab"
        writer.close()


@pytest.mark.parametrize(
    "header",
    [
        pytest.param((b"x", b"a\r\nset-cookie: b"), id="in the value"),
        pytest.param((b"x\ny", b"a"), id="in the name"),
        pytest.param((b"x", b"a\x00"), id="zero byte"),
    ],
)
async def test_a_header_cannot_smuggle_in_another(header: tuple[bytes, bytes]) -> None:
    async def forging(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [header]})
        await send({"type": "http.response.body"})

    async with serving(forging) as server:
        status, headers, _ = await exchange(server, GET)
        assert status == 500
        assert "set-cookie" not in headers


async def test_a_socket_can_be_inherited() -> None:
    parent = listen("127.0.0.1", 0)
    server = HttpServer(echo, inherited(os.dup(parent.fileno())))
    await server.start()
    assert server.port == parent.getsockname()[1]
    assert (await exchange(server, GET))[0] == 200
    await server.stop(0)
    waiting = asyncio.create_task(exchange(server, GET))  # nobody accepts: it waits in the parent's backlog
    successor = HttpServer(echo, inherited(os.dup(parent.fileno())))
    await successor.start()
    assert (await waiting)[0] == 200
    await successor.stop(0)
    parent.close()
