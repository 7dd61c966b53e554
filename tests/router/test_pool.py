"""Connections to workers over real sockets: what a failed exchange says of how far it got."""

from __future__ import annotations

import pytest

from router.server.pool import HttpToolsUpstream
from router.server.upstream import Cause, Progress, UpstreamError, UpstreamRequest
from tests.router.fakes import Connection, Received, Script, fake_workers, good

REQUEST = UpstreamRequest("POST", "/v1/completions", [], b"{}")


async def exchange(upstream: HttpToolsUpstream, url: str, request: UpstreamRequest = REQUEST) -> bytes:
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
        (silent, Progress.UNANSWERED),
        (half_a_head, Progress.ANSWERING),
        (half_a_body, Progress.ANSWERING),
        (not_http, Progress.ANSWERING),
    ],
)
async def test_a_broken_exchange_says_how_far_it_got(script: Script, progress: Progress) -> None:
    upstream = HttpToolsUpstream(connect_timeout=5)
    async with fake_workers(script) as workers:
        with pytest.raises(UpstreamError) as caught:
            await exchange(upstream, workers[0].url)
    assert (caught.value.cause, caught.value.progress) == (Cause.BROKEN, progress)
    await upstream.close()


async def test_where_no_connection_can_be_made_nothing_was_sent() -> None:
    upstream = HttpToolsUpstream(connect_timeout=5)
    async with fake_workers(good) as workers:
        url = workers[0].url
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(url, REQUEST)
    assert (caught.value.cause, caught.value.progress) == (Cause.REFUSED, Progress.UNSENT)
    await upstream.close()
