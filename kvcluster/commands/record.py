"""`kvcluster record`: a trace of hashed blocks from running routers, or from their access log."""

from __future__ import annotations

import asyncio
import gzip
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import aiohttp
import orjson
import uvloop
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.numbers import percent, tokens
from bench.recording import RecordingError, TraceRecorder, access_log_lines
from kvcluster.options import LOCAL_ROUTER, management_headers, management_url, tls_context
from kvcluster.terminal import exits, output
from runtime.backoff import Backoff
from runtime.sse import SseReader

MAX_EVENT = 32 * 2**20
"""Bytes of the event of one request: 19 for each block of its prompt."""
SILENT = 15.0
"""Seconds without an event or a comment after which a router counts as lost."""
CONNECTED = "connected"
"""What `_events` yields when the router has begun to send."""
RECONNECT = Backoff(0.2, 5.0)


class NotARouterError(Exception):
    """Nothing at the URL sends the events of requests."""


@exits(OSError, aiohttp.ClientError, NotARouterError)
def record(urls: Sequence[str], logs: Sequence[str], out: Path, *, seconds: float | None, limit: int | None) -> None:
    """Records from routers until the time is over, the limit is reached or Ctrl-C, or reads access logs."""
    if urls and logs:
        raise RecordingError("give management URLs of routers or --access-log FILE, not both")
    console = output()
    with TraceRecorder(out) as recorder:
        dropped = 0
        if not logs:
            routers = [management_url(url) for url in urls or (LOCAL_ROUTER,)]
            dropped = uvloop.run(_live(routers, recorder, console, seconds, limit))
        else:
            with _counter(console, recorder) as show:
                for number, (place, line) in enumerate(_read(logs)):
                    recorder.add(line, place)
                    if number % 1000 == 0:
                        show()
                    if recorder.written == limit:
                        break
        recorder.finish()
        _report(console, recorder, out, dropped)


def _report(console: Console, recorder: TraceRecorder, out: Path, dropped: int) -> None:
    console.print(
        f"{recorder.written:,} requests with {tokens(recorder.prompt_tokens)} prompt tokens, "
        f"{percent(recorder.hit_rate)} of them found in cache, written to {out}",
        markup=False,
    )
    for reason, count in recorder.left_out.most_common():
        console.print(f"left out, {reason}: {count:,}", markup=False)
    if recorder.unread:
        console.print(f"prompts that the router did not read, which share nothing in the trace: {recorder.unread:,}")
    if dropped:
        console.print(f"lost because events came faster than they were read: {dropped:,}")


def _read(names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in names:
        if name == "-":
            yield from access_log_lines(sys.stdin.buffer, "standard input")
            continue
        opened = gzip.open(name) if name.endswith(".gz") else Path(name).open("rb")  # noqa: SIM115  # closed below
        with opened as lines:
            yield from access_log_lines(cast(BinaryIO, lines), name)


@contextmanager
def _counter(console: Console, recorder: TraceRecorder) -> Iterator[Callable[[], None]]:
    """Shows how many requests have been recorded; yields a function that updates it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("waiting for requests")

        def show() -> None:
            left_out = sum(recorder.left_out.values())
            bar.update(task, description=f"{recorder.written:,} requests recorded, {left_out:,} left out")

        yield show


# --- live ---


async def _live(
    urls: Sequence[str], recorder: TraceRecorder, console: Console, seconds: float | None, limit: int | None
) -> int:
    """Record from routers. Returns how many requests were lost. An interrupt ends the recording, and is no error."""
    stop = asyncio.Event()
    dropped = 0
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with _counter(console, recorder) as show:

        def take(name: str, data: bytes) -> None:
            nonlocal dropped
            if stop.is_set():
                return
            if name == "dropped":
                dropped += int(orjson.loads(data)["count"])
            elif name == "request":
                recorder.add(orjson.loads(data))
                show()
                if recorder.written == limit:
                    stop.set()

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=SILENT)
        connector = aiohttp.TCPConnector(ssl=tls_context(None))
        async with aiohttp.ClientSession(timeout=timeout, headers=management_headers(), connector=connector) as session:
            for url in urls:
                await _check(session, url)
            followers = {asyncio.create_task(_follow(session, url, take, console)) for url in urls}
            stopped = asyncio.create_task(stop.wait())
            done, running = await asyncio.wait(
                {stopped, *followers}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            stop.set()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for task in done & followers:
                task.result()  # raises what one of them has found wrong
    return dropped


async def _check(session: aiohttp.ClientSession, url: str) -> None:
    """Raises `NotARouterError` if the URL is not that of a router's management port."""
    async with session.get(f"{url}/status", allow_redirects=False) as answer:
        if answer.status != 200:
            raise NotARouterError(
                f"{url}/status answers {answer.status}: give the URL of a router's management port, "
                "http://127.0.0.1:9000 in local mode"
            )


async def _follow(
    session: aiohttp.ClientSession, url: str, take: Callable[[str, bytes], None], console: Console
) -> None:
    """Read the events of one router, and connect again when it is lost, until cancelled."""
    failures = 0
    while True:
        try:
            async for name, data in _events(session, url):
                if name == CONNECTED:
                    console.print(f"recording from {url}", markup=False)
                failures = 0
                take(name, data)
            why = "it ended the stream"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
        failures += 1
        console.print(f"lost {url} ({why}); connecting again: what ends meanwhile is missing", markup=False)
        await asyncio.sleep(RECONNECT.delay(failures))


async def _events(session: aiohttp.ClientSession, url: str) -> AsyncIterator[tuple[str, bytes]]:
    """(name, data) of each event, the first one `CONNECTED`. Raises `aiohttp.ClientError`."""
    async with session.get(f"{url}/requests/events", params={"blocks": "1"}) as answer:
        answer.raise_for_status()
        reader = SseReader(MAX_EVENT)
        connected = False
        while piece := await answer.content.readany():
            if not connected:
                connected = True
                yield CONNECTED, b""
            for event in reader.feed(piece):
                yield event.name, event.data
