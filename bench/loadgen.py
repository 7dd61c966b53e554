"""The load generator: it sends the requests of a workload when they are due, whether or not earlier ones are answered.

It is an open loop: in a closed loop the arrivals would slow down with the cluster that is measured, which would hide
the queues. The load generator also measures itself (`LoadgenHealth`): how late requests left, for how long its event
loop was busy with other things, and how much of a core it used.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import aiohttp
import orjson

from bench.record import ErrorCause, Record, cause_of_status
from bench.result import LoadgenHealth, summary
from bench.stream import FirstToken, ending, status_error
from bench.workloads import MESSAGES, TimedRequest, Workload

_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_STREAMED_MESSAGE = {"stream": True}
"""The Messages API states its usage unasked."""

WORKER_HEADER = "x-kvcluster-worker"
REASON_HEADER = "x-kvcluster-reason"
MATCHED_HEADER = "x-kvcluster-matched-blocks"
STRATEGY_HEADER = "x-kvcluster-strategy"

PREPARED_REQUESTS = 64
"""Requests that are encoded ahead of time, so that a burst leaves at once."""
PREPARE_AHEAD = 0.004
"""Wall seconds that must be left until the next request is due, for another one to be encoded."""
LAG_INTERVAL = 0.05
READ_BUFFER = 64 * 2**20
"""Bytes of an answer that may wait unread: after the first token the rest stays in the socket reader's buffer until the
end, so that no coroutine is woken for every token."""

LATE = 0.020
"""Seconds of lateness (p99) from which the load generator counts as a bottleneck."""
LAGGING = 0.010
"""Seconds of event loop lag (p95) from which it does."""
BUSY = 0.85
"""Share of a core from which it does."""


class EndpointError(ConnectionError):
    """The endpoint cannot be measured at all. The message says what to check."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to send a workload to an endpoint."""

    speed: float = 1.0
    """Factor by which arrivals are faster, and by which measured times are multiplied."""
    model: str | None = None
    """Model that each body names; None: the endpoint is asked which one it serves."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request, for example for authorization."""
    tls: ssl.SSLContext | None = None
    """How an https:// endpoint's certificate is checked; None: as this machine does."""
    timeout: float = 600.0
    """Wall seconds after which a request is given up."""


@dataclass(frozen=True, slots=True)
class Driven:
    """What sending a workload gave."""

    records: list[Record]
    health: LoadgenHealth
    strategy: str
    """As the router's headers name it; empty: none of them did."""
    model: str | None


Progress = Callable[[int, int, int], None]
"""Called a few times a second with the requests sent, answered and failed so far."""
Started = Callable[[], None]
"""Called at the moment from which the arrivals count."""


async def served_model(session: aiohttp.ClientSession, url: str) -> str | None:
    """The first model that the endpoint lists; None: it has no such list. Raises `EndpointError`."""
    try:
        async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=10)) as answer:
            if answer.status == 401:
                raise EndpointError(f"{url} asks for an API key: set KVCLUSTER_API_KEY, or give --api-key-file")
            if answer.status != 200:
                return None
            listed = await answer.json(content_type=None)
    except EndpointError:
        raise
    except aiohttp.ClientConnectorCertificateError as error:
        raise EndpointError(
            f"{url} is not trusted ({error.certificate_error}); --ca takes the authorities to trust it by"
        ) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EndpointError(f"no answer from {url}/v1/models ({error}); is the server running there?") from error
    except ValueError:
        return None
    models = listed.get("data") if type(listed) is dict else None
    return str(models[0]["id"]) if models else None


def _fail(seen: dict[str, Any], cause: ErrorCause, words: str) -> None:
    seen["error"], seen["detail"] = cause, words


class _Run:
    """The state of one run. Times are those of `time.perf_counter` until they go into a record."""

    def __init__(self, session: aiohttp.ClientSession, url: str, options: LoadOptions, model: str | None) -> None:
        self.session = session
        self.url = url
        self.options = options
        self.model = {} if model is None else {"model": model}
        self.records: list[Record] = []
        self.lateness: list[float] = []
        self.lags: list[float] = []
        self.sent = self.failed = 0
        self.strategy = ""
        self.start = 0.0

    def encode(self, request: TimedRequest) -> tuple[TimedRequest, bytes]:
        streamed = _STREAMED_MESSAGE if request.path == MESSAGES else _STREAMED
        return request, orjson.dumps({**streamed, **self.model, **request.body}, default=list)

    def emulated(self, at: float) -> float:
        return (at - self.start) * self.options.speed

    async def send(self, request: TimedRequest, due: float, body: bytes) -> None:
        """Send one request, read its answer and keep its record. Raises nothing but `CancelledError`."""
        sent = time.perf_counter()
        self.lateness.append(sent - due)
        self.sent += 1
        seen: dict[str, Any] = {"scheduled": request.at, "sent": self.emulated(sent)}
        try:
            async with asyncio.timeout(self.options.timeout):
                await self._exchange(request, body, seen)
        except TimeoutError:
            _fail(seen, ErrorCause.TIMEOUT, f"no complete answer within {self.options.timeout:g} s")
        except (aiohttp.ClientError, OSError) as error:
            _fail(seen, ErrorCause.CONNECTION, type(error).__name__)
        self.failed += seen.get("error") is not None
        self.records.append(Record(request.index, **seen))

    async def _exchange(self, request: TimedRequest, body: bytes, seen: dict[str, Any]) -> None:
        async with self.session.post(self.url + request.path, data=body) as answer:
            headers, content = answer.headers, answer.content
            self.strategy = self.strategy or headers.get(STRATEGY_HEADER, "")
            seen["worker"] = headers.get(WORKER_HEADER, "")
            seen["reason"] = headers.get(REASON_HEADER, "")
            matched = headers.get(MATCHED_HEADER, "")
            seen["matched_blocks"] = int(matched) if matched.isdigit() else None
            if answer.status != 200:
                words, message = status_error(answer.status, await content.read())
                _fail(seen, cause_of_status(answer.status, message), words)
                return
            head, first = b"", FirstToken()
            while piece := await content.readany():
                head += piece
                if first.push(piece):
                    seen["first_token"] = self.emulated(time.perf_counter())
                    await content.wait_eof()
                    break
            seen["finished"] = self.emulated(time.perf_counter())
            end = ending(head + await content.read())
        seen["prompt_tokens"] = request.prompt_tokens if end.prompt_tokens is None else end.prompt_tokens
        seen["cached_tokens"], seen["output_tokens"] = end.cached_tokens, end.output_tokens
        if end.error is not None:
            _fail(seen, ErrorCause.BROKEN_STREAM, end.error)
        elif "first_token" not in seen:
            _fail(seen, ErrorCause.EMPTY, "an answer without content")

    async def watch(self, progress: Progress) -> None:
        """Measure how long the event loop keeps a timer waiting, and report progress."""
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(LAG_INTERVAL)
            self.lags.append(max(0.0, time.perf_counter() - asked - LAG_INTERVAL))
            progress(self.sent, len(self.records), self.failed)

    async def send_all(self, workload: Workload, started: Started) -> None:
        """Send every request when it is due, and wait for the last answer."""
        coming = workload.requests()
        prepared = deque(map(self.encode, islice(coming, PREPARED_REQUESTS)))
        # A garbage collection over everything that was imported would show in the measured times.
        gc.collect()
        gc.freeze()
        self.start = time.perf_counter()
        started()
        async with asyncio.TaskGroup() as tasks:
            while prepared:
                request, body = prepared[0]
                due = self.start + request.at / self.options.speed
                left = due - time.perf_counter()
                if left <= 0:
                    prepared.popleft()
                    tasks.create_task(self.send(request, due, body))
                    if not prepared:
                        prepared.extend(map(self.encode, islice(coming, 1)))
                    await asyncio.sleep(0)
                elif left > PREPARE_AHEAD and len(prepared) < PREPARED_REQUESTS:
                    before = len(prepared)
                    prepared.extend(map(self.encode, islice(coming, 1)))
                    await asyncio.sleep(0 if len(prepared) > before else left)
                else:
                    await asyncio.sleep(left)

    def health(self, cpu_seconds: float, wall_seconds: float) -> LoadgenHealth:
        lateness, lags = summary(self.lateness), summary(self.lags)
        share = cpu_seconds / wall_seconds if wall_seconds else 0.0
        why = []
        if lateness is not None and lateness.p99 > LATE:
            why.append(f"1 % of the requests left more than {lateness.p99 * 1e3:.0f} ms late")
        if lags is not None and lags.p95 > LAGGING:
            why.append(f"its event loop was {lags.p95 * 1e3:.0f} ms behind 5 % of the time")
        if share > BUSY:
            why.append(f"it used {share:.0%} of a core")
        return LoadgenHealth(lateness, lags, share, tuple(why))


async def drive(
    url: str, workload: Workload, options: LoadOptions, progress: Progress, started: Started = lambda: None
) -> Driven:
    """Send the workload to `url` (the base, without /v1) and collect every answer. Raises `EndpointError`."""
    connector = aiohttp.TCPConnector(limit=0, ssl=options.tls if options.tls is not None else True)
    timeout = aiohttp.ClientTimeout(total=None)  # that of `_Run.send` covers the wait for the end too
    headers = {"content-type": "application/json", **options.headers}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, read_bufsize=READ_BUFFER, auto_decompress=False
    ) as session:
        model = options.model or await served_model(session, url)
        run = _Run(session, url, options, model)
        watch = asyncio.create_task(run.watch(progress))
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            await run.send_all(workload, started)
        finally:
            watch.cancel()
        health = run.health(time.process_time() - cpu, time.perf_counter() - wall)
        progress(run.sent, len(run.records), run.failed)
    return Driven(sorted(run.records, key=lambda r: r.index), health, run.strategy, model)
