"""Answers with server-sent events as ASGI applications: how many are accepted, and how they end.

Not covered: real connections (tests/router/live/test_endpoints.py, tests/router/test_access_log.py), and how events
are read (tests/runtime/test_sse.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from runtime.http.event_stream import KEEP_ALIVE, EventStream, StreamLimit, set_within
from tests.virtual import CountingLoop, run


class Client:
    """Takes what is sent to it; each piece takes a second."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await asyncio.sleep(1)
        self.sent.append(message)

    def ask(self, stream: EventStream) -> asyncio.Task[None]:
        return asyncio.create_task(stream({"type": "http"}, self.receive, self.send))

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


class Events:
    """Two events, then nothing but keep-alives."""

    ended = False

    async def __call__(self) -> AsyncGenerator[bytes]:
        never = asyncio.Event()
        try:
            yield b"data: 1\n\n"
            yield b"data: 2\n\n"
            while not await set_within(never):
                yield KEEP_ALIVE
        finally:
            self.ended = True


def test_streams_that_begin_at_once_are_counted_when_they_are_accepted() -> None:
    async def main(loop: CountingLoop) -> None:
        limit = StreamLimit(2, "too many")
        clients = [Client() for _ in range(4)]
        tasks = [client.ask(EventStream(Events()(), limit)) for client in clients]
        await asyncio.sleep(3.5)
        assert sorted(client.status for client in clients) == [200, 200, 503, 503]
        refused = next(client for client in clients if client.status == 503)
        assert b"too many" in refused.sent[1]["body"]
        for client in clients:
            client.left.set()
        await asyncio.gather(*tasks)
        assert limit.open == 0

    run(main)


def test_a_client_that_leaves_ends_the_events_at_once() -> None:
    async def main(loop: CountingLoop) -> None:
        client, events, limit = Client(), Events(), StreamLimit(1, "too many")
        task = client.ask(EventStream(events(), limit))
        await asyncio.sleep(9.5)
        bodies = [message["body"] for message in client.sent[1:]]
        assert bodies == [b"data: 1\n\n", b"data: 2\n\n", KEEP_ALIVE]
        client.left.set()
        await task
        assert (loop.time(), events.ended, limit.open) == (9.5, True, 0)

    run(main)


def test_events_that_end_end_the_answer() -> None:
    async def one() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"

    async def main(loop: CountingLoop) -> None:
        client = Client()
        await client.ask(EventStream(one(), StreamLimit(1, "too many")))
        assert [message.get("more_body", False) for message in client.sent] == [False, True, False]

    run(main)


def test_what_fails_in_the_events_is_not_hidden() -> None:
    async def broken() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"
        raise ValueError("broken")

    async def main(loop: CountingLoop) -> None:
        limit = StreamLimit(1, "too many")
        with pytest.raises(ValueError, match="broken"):
            await Client().ask(EventStream(broken(), limit))
        assert limit.open == 0

    run(main)
