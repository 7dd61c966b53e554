"""A line for each request, in the access log and as events: it says what happened, and nothing of what was said.

Covered: every field against what the client and the worker saw, requests that fail, break off or are left, both
formats, digests of blocks, slow readers, the end. Not covered: what a trace is made of the lines (tests/kvcluster).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry

from kvcache.keys import block_keys
from router.metrics import Metrics
from router.server.access_log import AccessLog, Digests, fields
from router.server.record import RequestRecord, stated
from router.server.request_events import READERS
from tests.router.conftest import MovedClock, RunningRouter, StartRouter, http_client, until
from tests.router.fakes import DONE, Connection, Received, fake_workers, good, good_after, token, usage
from tests.router.test_process import LOOPBACK, router_process, started

SECRET = "the quick brown fox"
DIGESTS = Digests(b"salt")


@asynccontextmanager
async def read(router: RunningRouter, query: str = "") -> AsyncIterator[list[dict[str, Any]]]:
    """What a reader of the events has got so far."""
    lines: list[dict[str, Any]] = []
    before = len(router.router.recorder.readers)
    subscribed = asyncio.Event()

    async def follow() -> None:
        async with router.management.stream("GET", f"/requests/events{query}") as response:
            async for line in response.aiter_lines():
                subscribed.set()
                if line.startswith("data: "):
                    lines.append(orjson.loads(line[6:]))

    task = asyncio.create_task(follow())
    await subscribed.wait()
    try:
        yield lines
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: len(router.router.recorder.readers) == before)


async def streams(connection: Connection, request: Received) -> None:
    await connection.begin_stream()
    await connection.chunk(token("a") + token("b", "stop") + usage(32) + DONE)
    await connection.end_stream()


async def resets(connection: Connection, request: Received) -> None:
    connection.reset()


async def test_a_line_says_what_happened(start_router: StartRouter) -> None:
    prompt = list(range(100))
    async with fake_workers(resets, streams) as workers, start_router(workers) as router, read(router) as lines:
        headers = {"x-request-id": "mine", "x-session-id": "s", "authorization": f"Bearer {SECRET}"}
        body = {"prompt": prompt, "stream": True, "max_tokens": 7, "user": SECRET, "model": "m"}
        answer = await router.client.post(f"/v1/completions?key={SECRET}", json=body, headers=headers)
        await until(lambda: len(lines) == 1)
        (line,) = lines
        times = {name: line.pop(name) for name in ("at", "seconds", "ttft_seconds", "predicted_ttft_seconds")}
        assert len(line.pop("session")) == 16
        assert line == {
            "request_id": "mine",
            "method": "POST",
            "path": "/v1/completions",
            "model": "m",
            "status": 200,
            "bytes": len(answer.content),
            "stream": True,
            "max_tokens": 7,
            "worker": answer.headers["x-kvcluster-worker"],
            "attempts": 2,
            "failures": ["broken"],
            "reason": answer.headers["x-kvcluster-reason"],
            "matched_blocks": 0,
            "prompt_blocks": 7,
            "prompt_tokens": 100,
            "cached_tokens": 32,
            "output_tokens": 2,
        }
        assert 0 < times["ttft_seconds"] <= times["seconds"]
        assert SECRET not in str(lines)


async def test_what_is_long_is_cut(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router, read(router) as lines:
        await router.client.get("/v1/files/" + "f" * 1000, headers={"x-request-id": "i" * 1000})
        await router.complete("x", model="m" * 1000)
        await until(lambda: len(lines) == 2)
        assert (len(lines[0]["path"]), lines[0]["request_id"]) == (256, "i" * 256)
        assert lines[1]["model"] == "m" * 256


def test_what_cannot_be_encoded_is_replaced() -> None:
    assert stated("a\ud800b") == "a?b"


async def test_every_request_has_a_line(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router, read(router) as lines:
        asked = [
            ("GET", "/v1/models", None, 200),
            ("GET", "/nothing", None, 404),
            ("POST", "/v1/completions/", b"{}", 307),
            ("POST", "/v1/completions", b"no json", 200),
            ("POST", "/v1/embeddings", b"{}", 200),
            ("POST", "/v1/completions", b'{"prompt": "x"}', 200),
        ]
        for method, path, content, status in asked:
            assert (await router.client.request(method, path, content=content)).status_code == status
        await until(lambda: len(lines) == len(asked))
        assert [(line["method"], line["path"], line["status"]) for line in lines] == [
            (method, path, status) for method, path, _, status in asked
        ]
        assert [line.get("unread") for line in lines] == [None, None, None, "unreadable", None, None]
        assert ["worker" in line for line in lines] == [True, False, False, True, True, True]
        assert ["reason" in line for line in lines] == [False, False, False, False, False, True]


async def test_a_line_says_how_a_request_failed(start_router: StartRouter) -> None:
    async def breaks(connection: Connection, request: Received) -> None:
        if b"begins" in request.body:
            await connection.begin_stream()
            await connection.chunk(token("a"))
            await until(lambda: router.router.in_flight._requests != {})
        connection.reset()

    async with (
        fake_workers(breaks) as workers,
        start_router(workers, eject_after=0, retry_attempts=1) as router,
        read(router) as lines,
    ):
        answers = [await router.complete("begins", stream=True), await router.complete("fails")]
        await until(lambda: len(lines) == 2)
        assert [line["status"] for line in lines] == [answer.status_code for answer in answers] == [200, 503]
        assert [line["failures"] for line in lines] == [["broken"], ["broken"]]
        assert [line["bytes"] for line in lines] == [len(answer.content) for answer in answers]
        assert ["ttft_seconds" in line for line in lines] == [True, False]


async def test_a_client_that_leaves_has_a_line(start_router: StartRouter) -> None:
    never = asyncio.Event()
    async with fake_workers(good_after(never)) as workers, start_router(workers) as router, read(router) as lines:
        await router.leave_once(lambda: len(workers[0].received) == 1)
        await until(lambda: len(lines) == 1)
        assert (lines[0]["status"], lines[0]["attempts"]) == (499, 1)


async def test_digests_of_blocks_are_those_of_the_prompts_and_nobody_elses(start_router: StartRouter) -> None:
    long = list(range(40_000))
    prompts = [long[:100], long[:64], [9, *long[:63]], [1], long]
    async with (
        fake_workers(good) as workers,
        start_router(workers, access_log_salt="salt") as router,
        read(router) as plain,
        read(router, "?blocks=1") as lines,
    ):
        for prompt in prompts:
            await router.complete(prompt)
        await until(lambda: len(plain) == len(lines) == len(prompts))
        assert not any("block_hashes" in line for line in plain)
        assert [line["block_size"] for line in lines] == [16] * len(prompts)
        named = [line["block_hashes"] for line in lines]
        assert named == [[DIGESTS.name(key) for key in block_keys(prompt, 16)] for prompt in prompts]
        assert [len(names) for names in named] == [6, 4, 4, 0, 2500]
        assert named[0][:4] == named[1] == named[4][:4]
        assert not set(named[2]) & set(named[1])
        assert Digests(b"another").name(block_keys(prompts[0], 16)[0]) != named[0][0]


async def test_no_more_readers_than_there_may_be(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router, AsyncExitStack() as stack:
        streams = [router.management.stream("GET", "/requests/events") for _ in range(READERS + 2)]
        answers = await asyncio.gather(*map(stack.enter_async_context, streams))
        assert Counter(answer.status_code for answer in answers) == {200: READERS, 503: 2}
        refused = next(answer for answer in answers if answer.is_error)
        assert json.loads(await refused.aread())["error"]["code"] == 503
        await until(lambda: len(router.router.recorder.readers) == READERS)
        router.router.request_events.close()
        await until(lambda: not router.router.recorder.readers)


# --- the log itself ---


def finished(path: str = "/v1/completions") -> RequestRecord:
    clock = MovedClock()
    record = RequestRecord("GET", path, clock, clock(), True, request_id=b'a"b\nc')
    clock.now += 1.5
    record.finish(404)
    return record


@pytest.mark.parametrize("fmt", ["kv", "json"])
def test_a_line_of_each_format(fmt: Any) -> None:
    output, metrics = io.BytesIO(), Metrics(CollectorRegistry())
    log = AccessLog(output, fmt, DIGESTS, metrics)
    log.read(finished("/v1/" + "x" * 1000))
    log.close()
    (line,) = output.getvalue().decode().splitlines()
    path = "/v1/" + "x" * 252
    if fmt == "json":
        row = json.loads(line)
        assert (row["event"], row["logger"], row["request_id"], row["seconds"]) == (
            "request",
            "router.access",
            'a"b\nc',
            1.5,
        )
        assert row["path"] == path
    else:
        assert " info router.access request at=" in line
        assert rf'request_id="a\"b\nc" method=GET path={path} status=404 bytes=0 seconds=1.5' in line


def test_lines_that_find_no_room_are_dropped_and_counted() -> None:
    written, go_on = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def write(self, data: Any, /) -> int:
            written.set()
            go_on.wait()
            return super().write(data[:100])  # a pipe may take a part

    output, metrics = Slow(), Metrics(CollectorRegistry())
    log = AccessLog(output, "kv", DIGESTS, metrics, queued=3)
    log.read(finished())
    written.wait()
    for _ in range(5):
        log.read(finished())
    assert metrics.access_log_dropped.value == 2
    go_on.set()
    log.close()
    assert len(output.getvalue().splitlines()) == 4
    assert output.getvalue().count(b"status=404") == 4


def test_lines_that_cannot_be_written_are_counted_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Full(io.BytesIO):
        fails = True

        def write(self, data: Any, /) -> int:
            if self.fails:
                raise OSError(errno.ENOSPC, "no space")
            return super().write(data)

    output, metrics = Full(), Metrics(CollectorRegistry())
    log = AccessLog(output, "kv", DIGESTS, metrics)
    for _ in range(3):
        log.read(finished())
    while metrics.access_log_dropped.value < 3:
        time.sleep(0)
    output.fails = False  # there is room again
    log.read(finished())
    log.close()
    assert len(output.getvalue().splitlines()) == 1
    assert [record.message for record in caplog.records] == ["access_log_failed"]


@pytest.mark.process
async def test_a_router_whose_access_log_nobody_reads_serves_and_ends() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)  # until the pipe is full
    os.set_blocking(writing, True)
    flags = (*LOOPBACK, "--access-log", "json", "--drain-delay", "0")
    async with fake_workers(good) as (worker,), router_process(*flags, "--workers", worker.url, out=writing) as process:
        os.close(writing)
        port, _ = await started(process)
        async with http_client(port) as client:
            for _ in range(3):
                assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    os.close(reading)


def test_the_time_of_a_line_is_that_of_the_arrival() -> None:
    assert fields(finished(), DIGESTS, lambda: 1e9)["at"] == 1e9 - 1.5
