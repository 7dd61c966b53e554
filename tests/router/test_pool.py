"""Connections to workers over real sockets: how far a failed request got, and which closed connections are replaced.

Covered: stale connections, resets, unsolicited bytes, HEAD, large bodies, removed workers. Not covered: every order of
events on one connection (test_connection_model.py), https workers, what follows from a failure (test_failures.py).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import uvloop

from router.core.retries import FailureCause, Progress
from router.upstream.connection import MAX_HEADER_BYTES
from router.upstream.interface import UpstreamError, UpstreamRequest
from router.upstream.pool import ConnectionPool
from tests.router.conftest import StartRouter
from tests.router.fakes import Connection, Received, Script, fake_workers, good

REQUEST = UpstreamRequest("POST", "/v1/load_lora_adapter", [], b"{}")
REPEATABLE = UpstreamRequest("POST", "/v1/completions", [], b"{}", repeatable=True)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def exchange(upstream: ConnectionPool, url: str, request: UpstreamRequest = REQUEST) -> bytes:
    """One whole exchange; the answer's body."""
    response = await upstream.send(url, request)
    try:
        body = b""
        while piece := await response.read():
            body += piece
        return body
    finally:
        response.close()


async def silent(connection: Connection, request: Received) -> None:
    connection.reset()


async def half_a_head(connection: Connection, request: Received) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-le")
    connection.writer.close()


async def half_a_body(connection: Connection, request: Received) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    connection.writer.close()


async def not_http(connection: Connection, request: Received) -> None:
    await connection.send(b"SSH-2.0-OpenSSH\r\n")


@pytest.mark.parametrize(
    ("script", "progress"),
    [
        pytest.param(silent, Progress.UNANSWERED, id="silent"),
        pytest.param(half_a_head, Progress.ANSWERING, id="half a head"),
        pytest.param(half_a_body, Progress.ANSWERING, id="half a body"),
        pytest.param(not_http, Progress.ANSWERING, id="not HTTP"),
    ],
)
async def test_a_broken_exchange_says_how_far_it_got(script: Script, progress: Progress) -> None:
    upstream = ConnectionPool(connect_timeout=5)
    async with fake_workers(script) as workers:
        with pytest.raises(UpstreamError) as caught:
            await exchange(upstream, workers[0].url)
        assert len(workers[0].received) == 1  # a connection that was not used before is not replaced
    assert (caught.value.cause, caught.value.progress) == (FailureCause.BROKEN, progress)
    await upstream.close()


async def test_where_no_connection_can_be_made_nothing_was_sent() -> None:
    upstream = ConnectionPool(connect_timeout=5)
    async with fake_workers(good) as workers:
        url = workers[0].url
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(url, REQUEST)
    assert (caught.value.cause, caught.value.progress) == (FailureCause.REFUSED, Progress.UNSENT)
    await upstream.close()


@pytest.mark.parametrize(
    "loop", [pytest.param(asyncio.SelectorEventLoop, id="asyncio"), pytest.param(uvloop.Loop, id="uvloop")]
)
def test_nobody_waits_for_a_connection_that_could_not_be_made(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """uvloop makes the protocol before it connects, and does not tell it that it failed."""

    async def refused() -> None:
        upstream = ConnectionPool(connect_timeout=5)
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            with pytest.raises(UpstreamError):
                await upstream.send(f"http://127.0.0.1:{nobody.getsockname()[1]}", REQUEST)
        async with asyncio.timeout(5):
            await upstream.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(refused())


@dataclass
class Engine:
    """A worker's end of its connections, by system calls alone: it closes when a test says so, even between two steps
    of the event loop."""

    upstream: ConnectionPool
    listener: socket.socket
    open: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def send(self, request: UpstreamRequest) -> asyncio.Task[bytes]:
        return asyncio.create_task(exchange(self.upstream, self.url, request))

    async def accept(self) -> socket.socket:
        connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        connection.setblocking(False)
        self.open.append(connection)
        return connection

    async def used(self) -> socket.socket:
        """A connection that has carried one request, and is idle."""
        running = self.send(REQUEST)
        connection = await self.accept()
        await self.read(connection)
        await self.answer(connection, running)
        return connection

    async def read(self, connection: socket.socket) -> bytes:
        data = b""
        while not data.endswith(b"{}"):
            data += await asyncio.get_running_loop().sock_recv(connection, 65536)
        return data

    async def answer(self, connection: socket.socket, running: asyncio.Task[bytes]) -> None:
        await asyncio.get_running_loop().sock_sendall(connection, OK)
        assert await running == b"ok"

    async def received(self, request: UpstreamRequest) -> tuple[socket.socket, asyncio.Task[bytes]]:
        """The worker has read a request, whole, from a connection that was used before."""
        connection = await self.used()
        running = self.send(request)
        await self.read(connection)
        return connection, running


async def failure(running: asyncio.Task[bytes]) -> tuple[FailureCause, Progress]:
    with pytest.raises(UpstreamError) as caught:
        await running
    return caught.value.cause, caught.value.progress


@asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    upstream = ConnectionPool(connect_timeout=5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        made = Engine(upstream, listener)
        try:
            yield made
        finally:
            await upstream.close()
            for connection in made.open:
                connection.close()


async def test_what_was_closed_before_it_could_read_the_request_is_replaced_whatever_the_request() -> None:
    async with engine() as worker:
        stale = await worker.used()
        stale.close()  # the event loop has not seen it yet
        running = worker.send(REQUEST)
        fresh = await worker.accept()
        assert (await worker.read(fresh)).startswith(b"POST /v1/load_lora_adapter ")
        await worker.answer(fresh, running)


async def reset_when_received(worker: Engine, request: UpstreamRequest) -> asyncio.Task[bytes]:
    """The request has arrived at a connection that was used before, whose worker closes it without reading it all."""
    stale = await worker.used()
    running = worker.send(request)
    await asyncio.get_running_loop().sock_recv(stale, 1)
    stale.close()
    return running


async def test_what_was_reset_behind_the_request_is_replaced() -> None:
    async with engine() as worker:
        running = await reset_when_received(worker, REPEATABLE)
        fresh = await worker.accept()
        await worker.read(fresh)
        await worker.answer(fresh, running)


async def test_a_reset_is_no_proof_that_the_request_was_not_read() -> None:
    async with engine() as worker:
        running = await reset_when_received(worker, REQUEST)
        assert await failure(running) == (FailureCause.BROKEN, Progress.UNANSWERED)


async def test_a_request_that_was_received_goes_out_again_only_if_that_does_no_harm() -> None:
    async with engine() as worker:
        stale, running = await worker.received(REPEATABLE)
        stale.close()
        fresh = await worker.accept()
        await worker.read(fresh)
        await worker.answer(fresh, running)

        running = worker.send(REQUEST)
        await worker.read(fresh)
        fresh.close()
        assert await failure(running) == (FailureCause.BROKEN, Progress.UNANSWERED)


async def test_a_worker_that_closes_long_after_it_got_the_request_did_not_close_because_it_was_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.upstream.pool.STALE_WITHIN", 0.0)
    async with engine() as worker:
        connection, running = await worker.received(REPEATABLE)
        connection.close()
        assert await failure(running) == (FailureCause.BROKEN, Progress.UNANSWERED)


async def test_a_connection_is_replaced_once() -> None:
    async with engine() as worker:
        stale, running = await worker.received(REPEATABLE)
        stale.close()
        fresh = await worker.accept()
        await worker.read(fresh)
        fresh.close()
        assert await failure(running) == (FailureCause.BROKEN, Progress.UNANSWERED)


async def test_what_may_have_been_done_is_remembered_when_the_replacement_is_refused() -> None:
    async with engine() as worker:
        stale, running = await worker.received(REPEATABLE)
        worker.listener.close()
        stale.close()
        assert await failure(running) == (FailureCause.REFUSED, Progress.UNANSWERED)


async def test_an_answer_that_had_begun_is_not_asked_for_again() -> None:
    async with engine() as worker:
        connection, running = await worker.received(REPEATABLE)
        await asyncio.get_running_loop().sock_sendall(connection, OK[:12])
        connection.close()
        assert await failure(running) == (FailureCause.BROKEN, Progress.ANSWERING)


async def test_an_engine_that_closes_idle_connections_costs_neither_attempts_nor_its_prefix(
    start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """It reads the next request on a connection that it has given up, and closes without a word."""
    requests = 0

    async def forgetful(connection: Connection, request: Received) -> None:
        nonlocal requests
        requests += 1
        if requests % 2 == 0:
            connection.writer.close()
        else:
            await good(connection, request)

    async with fake_workers(forgetful) as workers, start_router(workers) as router:
        for _ in range(10):
            response = await router.complete()
            assert (response.status_code, response.headers["x-kvcluster-attempts"]) == (200, "1")
        assert router.metric("retries_total", cause="broken") == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_what_nobody_asked_for_is_not_the_beginning_of_the_next_answer() -> None:
    async with engine() as worker:
        talking = await worker.used()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(talking, b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nfor")
        await loop.sock_recv(talking, 1)  # the router has closed it
        running = worker.send(REQUEST)
        fresh = await worker.accept()
        await worker.read(fresh)
        await worker.answer(fresh, running)


async def test_a_body_behind_the_answer_to_head_is_not_the_beginning_of_the_next_answer() -> None:
    async with engine() as worker:
        for method, answer in (("HEAD", OK), ("GET", OK)):
            running = asyncio.create_task(exchange(worker.upstream, worker.url, UpstreamRequest(method, "/", [], b"")))
            connection = await worker.accept()
            await asyncio.get_running_loop().sock_recv(connection, 65536)
            await asyncio.get_running_loop().sock_sendall(connection, answer)
            assert await running == (b"" if method == "HEAD" else b"ok")


async def test_a_large_request_is_sent_whole() -> None:
    body = bytes(range(256)) * 4096 + b"{}"
    async with fake_workers(good) as workers:
        upstream = ConnectionPool(connect_timeout=5)
        await exchange(upstream, workers[0].url, UpstreamRequest("POST", "/v1/completions", [], body))
        assert workers[0].received[0].body == body
        await upstream.close()


async def test_the_head_of_an_answer_leaves_its_connection_free() -> None:
    connections = set()

    async def script(connection: Connection, request: Received) -> None:
        connections.add(connection.writer)
        await connection.send(b"HTTP/1.1 405 Method Not Allowed\r\nallow: GET\r\ncontent-length: 31\r\n\r\n")

    upstream = ConnectionPool(connect_timeout=5)
    async with fake_workers(script) as workers:
        for _ in range(3):
            response = await upstream.send(workers[0].url, UpstreamRequest("HEAD", "/v1/models", [], b""))
            assert (response.status, await response.read()) == (405, b"")
            response.close()
    assert len(connections) == 1
    await upstream.close()


async def test_an_answer_whose_head_does_not_end_is_an_error_not_memory() -> None:
    async def endless(connection: Connection, request: Received) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await connection.send(b"x-filler: %s\r\n" % (b"x" * 4096))

    upstream = ConnectionPool(connect_timeout=5)
    async with fake_workers(endless) as workers:
        with pytest.raises(UpstreamError, match=f"more than {MAX_HEADER_BYTES} bytes") as caught:
            await exchange(upstream, workers[0].url)
    assert caught.value.progress is Progress.ANSWERING
    await upstream.close()


@pytest.mark.parametrize(
    ("keep_alive", "connections"), [pytest.param(0.0, 3, id="over at once"), pytest.param(1e6, 1, id="never over")]
)
async def test_a_connection_that_has_been_idle_for_too_long_is_not_used_again(
    keep_alive: float, connections: int
) -> None:
    used = set()

    async def script(connection: Connection, request: Received) -> None:
        used.add(connection.writer)
        await good(connection, request)

    upstream = ConnectionPool(connect_timeout=5, keep_alive=keep_alive)
    async with fake_workers(script) as workers:
        for _ in range(3):
            await exchange(upstream, workers[0].url)
    assert len(used) == connections
    await upstream.close()


# --- a worker that is removed ---


async def test_a_removed_worker_loses_its_idle_connections_at_once_and_those_in_use_after_their_answer() -> None:
    loop = asyncio.get_running_loop()
    async with engine() as worker:
        busy, running = await worker.received(REQUEST)
        idle = await worker.used()
        worker.upstream.remove(worker.url)
        assert await loop.sock_recv(idle, 1) == b"", "closed"
        await worker.answer(busy, running)
        assert await loop.sock_recv(busy, 1) == b"", "closed"


async def test_a_request_that_a_removed_worker_dropped_is_not_sent_to_it_again() -> None:
    async with engine() as worker:
        used, running = await worker.received(REPEATABLE)
        worker.upstream.remove(worker.url)
        used.close()
        with pytest.raises(UpstreamError, match="before its answer"):
            await running


async def test_the_end_of_the_router_cuts_what_a_removed_worker_still_answers() -> None:
    async with engine() as worker:
        running = worker.send(REQUEST)
        busy = await worker.accept()
        await worker.read(busy)
        worker.upstream.remove(worker.url)
        await worker.upstream.close()
        assert await asyncio.get_running_loop().sock_recv(busy, 1) == b""
        assert await running == b""
