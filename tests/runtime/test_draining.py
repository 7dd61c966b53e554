"""Serving while draining.

Covers: that connections are accepted, answers say close, and no client is cut off without a word. Not covered: how
long draining lasts (test_drain_time.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Receive, Scope, Send

from runtime.http.server import QUIET_BEFORE_CLOSING, HttpServer
from runtime.sockets import listen
from tests.runtime.http.test_server import GET, answer, connect, echo, exchange, read_answer, serving, until


def gated(release: asyncio.Event) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """An app that sends the head of /begun at once, and ends it, and begins /slow, at the release."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"o", "more_body": True})
            await release.wait()
            await send({"type": "http.response.body", "body": b"k"})
            return
        if scope["path"] == "/slow":
            await release.wait()
        await answer(send)

    return app


def get(path: str) -> bytes:
    return b"GET %s HTTP/1.1\r\nhost: h\r\n\r\n" % path.encode()


async def test_while_draining_connections_are_accepted_and_answers_say_close() -> None:
    async with serving() as server:
        idle_reader, idle_writer = await connect(server)
        idle_writer.write(GET)
        assert "connection" not in (await read_answer(idle_reader))[1]
        server.drain()
        for _ in range(3):
            assert (await exchange(server, GET))[1]["connection"] == "close"
        assert server.connections == 1  # an idle one is left alone ...
        idle_writer.write(GET)
        assert (await read_answer(idle_reader))[1]["connection"] == "close"
        assert await idle_reader.read() == b""  # ... until it has been told
        idle_writer.close()


async def test_an_answer_under_way_says_close_if_its_head_is_not_out() -> None:
    release = asyncio.Event()
    async with serving(gated(release)) as server:
        running = asyncio.create_task(exchange(server, get("/slow")))
        await until(lambda: server.in_flight == 1)
        server.drain()
        release.set()
        assert (await running)[1]["connection"] == "close"


@pytest.mark.parametrize("stop", [False, True], ids=["draining", "stopping"])
async def test_a_connection_whose_answer_had_begun_is_not_closed_without_a_word(stop: bool) -> None:
    release = asyncio.Event()
    async with serving(gated(release)) as server:
        reader, writer = await connect(server)
        writer.write(get("/begun"))
        await until(lambda: server.in_flight == 1)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head
        server.drain()
        stopping = asyncio.create_task(server.stop(10)) if stop else None
        await asyncio.sleep(0)
        release.set()
        assert await reader.readexactly(2) == b"ok"
        writer.write(GET)  # the client cannot know yet
        assert (await read_answer(reader))[1]["connection"] == "close"
        assert await reader.read() == b""
        writer.close()
        if stopping is not None:
            await stopping


async def test_of_pipelined_requests_the_last_answer_says_close() -> None:
    release = asyncio.Event()
    async with serving(gated(release)) as server:
        reader, writer = await connect(server)
        writer.write(get("/slow") * 2)
        await until(lambda: server.in_flight == 2)
        server.drain()
        writer.write(get("/slow"))
        release.set()
        answers = [(await read_answer(reader))[1] for _ in range(2)]
        assert [headers.get("connection") for headers in answers] == [None, "close"]
        writer.close()


async def test_stopping_ends_an_idle_connection_that_was_never_told() -> None:
    server = HttpServer(echo, listen("127.0.0.1", 0))
    await server.start()
    reader, writer = await connect(server)
    writer.write(GET)
    await read_answer(reader)
    server.drain()
    await server.stop(10)
    assert await reader.read() == b""
    assert server.connections == 0
    writer.close()


async def test_idle_connections_stay_open_while_their_client_goes_on_sending() -> None:
    """A client takes its idle connections one by one; none is closed under its hands, and each is told to close."""
    server = HttpServer(echo, listen("127.0.0.1", 0))
    await server.start()
    pool = [await connect(server) for _ in range(6)]
    for reader, writer in pool:
        writer.write(GET)
        await read_answer(reader)
    stopping = asyncio.create_task(server.stop(10))
    for reader, writer in pool:
        await asyncio.sleep(
            QUIET_BEFORE_CLOSING * 0.6
        )  # together they take far longer than an idle connection is kept for
        writer.write(GET)
        assert (await read_answer(reader))[1]["connection"] == "close"
    await stopping
    assert server.connections == 0
    for _, writer in pool:
        writer.close()
