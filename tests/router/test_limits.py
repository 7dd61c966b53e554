"""The limits of the data port: sizes, numbers and times of requests, and the memory that their bodies take.

Covered: that the router passes its settings on to the server and frees bodies in time. Not covered: each limit in
every state of a connection (tests/runtime/http).
"""

from __future__ import annotations

import asyncio
import weakref
from contextlib import AsyncExitStack

import pytest

from router.settings import Settings
from runtime.http.request import ServerRequest
from runtime.settings import SettingsError
from tests.router.conftest import StartRouter, until
from tests.router.fakes import DONE, fake_workers, good, good_after, streaming, token


async def test_limits_of_the_data_port(start_router: StartRouter) -> None:
    async with (
        fake_workers(good) as workers,
        start_router(workers, max_body_bytes=1000, max_headers=20) as router,
    ):
        too_large = await router.client.post("/v1/completions", content=b"x" * 1001)
        assert too_large.status_code == 413
        assert set(too_large.json()["error"]) == {"message", "type", "param", "code"}
        reader, writer = await asyncio.open_connection("127.0.0.1", router.data.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(10_000)) + b"\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()
        assert workers[0].received == []
        assert router.metric("requests_total", code="413", strategy="round_robin") == 1
        assert router.metric("requests_total", code="431", strategy="round_robin") == 1


async def test_half_a_request_then_silence(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers, body_timeout=0.1) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.data.port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 50\r\n\r\n{"prompt"')
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert workers[0].received == []


async def test_more_requests_than_the_limit_are_503(start_router: StartRouter) -> None:
    release = asyncio.Event()
    workers_of = fake_workers(good_after(release))
    async with workers_of as workers, start_router(workers, max_concurrent_requests=2) as router:
        running = [asyncio.create_task(router.complete()) for _ in range(2)]
        await until(lambda: len(workers[0].received) == 2)
        refused = await router.complete()
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        release.set()
        assert [(await task).status_code for task in running] == [200, 200]


def test_the_total_of_bodies_has_room_for_one() -> None:
    with pytest.raises(SettingsError, match="max-total-body-bytes"):
        Settings.load(["--max-body-bytes", "1000", "--max-total-body-bytes", "999"])
    assert Settings.load(["--max-body-bytes", str(2**30)]).total_body_bytes == 2**32


async def test_when_bodies_take_all_the_memory_there_is_the_next_is_told_to_come_again(
    start_router: StartRouter,
) -> None:
    release = asyncio.Event()
    limits = {"max_body_bytes": 3_000_000, "max_total_body_bytes": 4_000_000}
    async with fake_workers(good_after(release)) as workers, start_router(workers, **limits) as router:
        body = b"{" + b" " * 2_500_000 + b"}"
        first = asyncio.create_task(router.client.post("/v1/embeddings", content=body))
        await until(lambda: len(workers[0].received) == 1)
        refused = await router.client.post("/v1/embeddings", content=body)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        release.set()
        assert (await first).status_code == 200
        assert (await router.client.post("/v1/embeddings", content=body)).status_code == 200
        assert workers[0].received[0].body == body


async def test_a_body_takes_room_until_its_answer_begins(start_router: StartRouter) -> None:
    """A long stream does not keep its prompt's, or its images', bytes from others."""
    release = asyncio.Event()
    script = streaming(token("Hel"), release=release, rest=[token("lo", "length") + DONE])
    limits = {"max_body_bytes": 3_000_000, "max_total_body_bytes": 4_000_000}
    async with fake_workers(script) as workers, start_router(workers, **limits) as router, AsyncExitStack() as open_:
        body = b"{" + b" " * 2_500_000 + b"}"
        streams = []
        for _ in range(4):
            answer = await open_.enter_async_context(router.client.stream("POST", "/v1/embeddings", content=body))
            streams.append(answer.aiter_bytes())
            assert await anext(streams[-1]) == token("Hel")
        release.set()
        for stream in streams:
            assert b"".join([piece async for piece in stream]) == token("lo", "length") + DONE
        assert [received.body for received in workers[0].received] == [body] * 4


class Body(bytearray):
    """Bytes that can be watched: `bytes` takes no weak reference."""


@pytest.mark.parametrize("size", [100, 400_000], ids=["read on the loop", "read in a thread"])
async def test_nothing_of_the_router_keeps_a_body_whose_answer_has_begun(start_router: StartRouter, size: int) -> None:
    release, begun = asyncio.Event(), asyncio.Event()
    script = streaming(token("Hel"), release=release, rest=[token("lo", "length") + DONE])

    class Connection:
        """A client's, which takes whatever is written."""

        writable = True

        async def drain(self) -> None:
            raise AssertionError("it takes everything at once")

        def write(self, data: bytes) -> None:
            begun.set()

        def common_headers(self) -> list[tuple[bytes, bytes]]:
            return []

        def refusal_headers(self, request: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
            return []

        def release_body(self, size: int) -> None:
            pass

        def answered(self) -> None:
            pass

        def close(self) -> None:
            raise AssertionError("the answer is complete")

    async with fake_workers(script) as workers, start_router(workers) as router:
        await router.ready(1)
        bodies = [Body(b'{"stream": true, "prompt": "' + b"a " * (size // 2) + b'"}')]
        seen = weakref.ref(bodies[0])
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": [], "http_version": "1.1",
        }  # fmt: skip
        request = ServerRequest(Connection(), scope, bodies.pop(), keep_alive=True)
        request.task = answer = asyncio.create_task(request.handle(router.router.data_plane))
        await begun.wait()
        await until(lambda: seen() is None)  # a thread of the executor lets go of it a moment after it has answered
        assert not answer.done()
        release.set()
        await answer
