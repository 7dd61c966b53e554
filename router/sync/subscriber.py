"""Follows one worker's cache feed for ever: a snapshot, then the stream of changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import aiohttp

from kvcache.feed import MSGPACK, FeedError, Snapshot, WorkerInfo, decode_batch, decode_snapshot, encode_position
from kvcache.ranks import split_rank
from router.core.errors import (
    AgentListed,
    DuplicateWorker,
    FeedGap,
    FeedRejected,
    Mismatch,
    RejectReason,
    Resync,
    StaleEpoch,
)
from router.core.fleet import Fleet
from router.metrics import Metrics
from runtime.backoff import Backoff
from runtime.logs import EventLogger
from runtime.sse import EventTooLargeError, SseReader

logger = EventLogger(__name__)


class NoFeedError(Exception):
    """The worker serves no cache feed (404), as a plain vLLM."""


class ResyncError(Exception):
    """The stream cannot be continued from the position that was reached: a new snapshot is needed."""

    resync = Resync.RESET


@dataclass(frozen=True, slots=True)
class FeedPolicy:
    """Timeouts and pauses in seconds, sizes in bytes."""

    reconnect: Backoff = Backoff(0.05, 1.0)
    """A worker that restarts is found again within the longest of these delays."""
    idle_timeout: float = 3.0
    """A stream that brings nothing for this long is dropped: a worker reports its load every second."""
    connect_timeout: float = 2.0
    snapshot_timeout: float = 30.0
    max_snapshot_bytes: int = 256 * 2**20
    max_event_bytes: int = 8 * 2**20
    no_feed_retry: float = 30.0
    """Pause before a worker without a feed is asked again."""
    thread_bytes: int = 256 * 1024
    """Snapshots larger than this are decoded in a thread."""


@dataclass(eq=False)
class Subscriber:
    """One worker's feed, applied to the fleet. That of a data-parallel rank (`kvcache.ranks`) is one of its process's.

    `on_connected` is called when the worker's own feed answers, `on_disconnected` when a connected stream ends,
    `on_refused(why)` when the worker's own feed refuses connections, and `on_described(info)` when a snapshot says what
    the worker is, whether it is taken in or refused. A feed at another address than the worker's
    (`feed`: that of an agent beside the engine) says nothing about whether the engine is alive.
    """

    url: str
    fleet: Fleet
    session: aiohttp.ClientSession
    metrics: Metrics
    _: KW_ONLY
    clock: Callable[[], float]
    rng: random.Random
    on_connected: Callable[[], None]
    on_refused: Callable[[str], None]
    on_disconnected: Callable[[], None] = lambda: None
    on_described: Callable[[WorkerInfo], None] = lambda info: None
    feed: str | None = None
    policy: FeedPolicy = field(default_factory=FeedPolicy)
    _address: str = field(init=False)
    _query: str = field(init=False)
    _position: tuple[int, int] | None = field(default=None, init=False)
    """Epoch and sequence number of the last batch that was applied; None: a snapshot is needed."""
    _failures: int = field(default=0, init=False)
    """Attempts that failed since the last batch."""
    _resumed_at: float = field(default=-math.inf, init=False)
    """When a gap was last followed by a snapshot without a pause."""
    _connected: bool = field(default=False, init=False)
    _feedless: bool = field(default=False, init=False)
    """That there is no feed has been logged."""

    def __post_init__(self) -> None:
        address, rank = split_rank(self.url)
        self._address = self.feed or address
        self._query = f"?rank={rank}" if rank else ""

    @property
    def proves_liveness(self) -> bool:
        """Whether the feed shows that the worker is alive now: it is connected, and the worker's own. While it does
        not, `sync.liveness` probes the worker."""
        return self._connected and self.feed is None

    def forget_position(self) -> None:
        """No process listens at the worker's address: the next one that does has another cache."""
        if self.feed is None and not self._connected:
            self._position = None

    async def run(self) -> None:
        """Follow the feed until cancelled."""
        while True:
            try:
                await self._follow()
            except NoFeedError:
                if not self._feedless:
                    self._feedless = True
                    self._log("no_feed", logging.INFO, "routed by load and by what this router has sent there")
                self.fleet.set_feedless(self.url, feedless=True)
                self.metrics.feed_connects.labels("no_feed").inc()
                self._connected = False
                await asyncio.sleep(self.policy.no_feed_retry)
                continue
            except (ResyncError, FeedGap, StaleEpoch) as error:
                self._log("feed_gap", logging.INFO, str(error))
                self.metrics.feed_gaps.labels(error.resync.value).inc()
                self._position = None
                now = self.clock()
                if self._failures == 0 and now - self._resumed_at > self.policy.reconnect.longest:
                    self._failures, self._resumed_at = 1, now
                    continue  # at once; after a pause if a gap follows again within `reconnect.longest`
            except FeedRejected as error:
                self._log("feed_refused", logging.ERROR, str(error))
                self.metrics.feed_refusals.labels(error.reason.value).inc()
                self._position = None
            except (FeedError, EventTooLargeError) as error:
                self._log("feed_unreadable", logging.ERROR, str(error))
                self.metrics.feed_refusals.labels("malformed").inc()
                self._position = None
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._lost(error)
            except Exception as error:  # noqa: BLE001  # nothing that one worker sends may end its subscription
                self._log("feed_failed", logging.ERROR, repr(error))
                self.metrics.feed_refusals.labels("unexpected").inc()
                self._position = None
            finally:
                if self._connected:
                    self._connected = False
                    self.on_disconnected()
            await asyncio.sleep(self.policy.reconnect.delay(self._failures + 1, self.rng.random()))
            self._failures += 1

    def _lost(self, error: Exception) -> None:
        if self.feed is not None:
            # Perhaps there is no agent there, or not yet. If it has ever said what the worker holds, this does nothing.
            self.fleet.set_feedless(self.url, feedless=True)
        if self._failures == 0:
            self._log("feed_lost", logging.WARNING, repr(error))
        self.metrics.feed_connects.labels("failed").inc()
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        if isinstance(cause, ConnectionRefusedError):
            self._position = None  # no process listens: the next one that does has another cache
            if self.feed is None:
                self.on_refused("its feed refuses connections")

    async def _follow(self) -> None:
        if self._position is None:
            self._position = await self._take_snapshot()
        epoch, seq = self._position
        headers = {"Accept": "text/event-stream", "Last-Event-ID": encode_position(epoch, seq)}
        async with self._get("/cache/events", headers) as response:
            self._expect(response, "text/event-stream")
            self.metrics.feed_connects.labels("connected").inc()
            self._connected = True
            self._feedless = False
            if self.feed is None:
                self.on_connected()
            reader = SseReader(self.policy.max_event_bytes)
            while piece := await response.content.readany():
                if self.feed is None:
                    self.fleet.mark_alive(self.url, self.clock())
                for message in reader.feed(piece):
                    self._apply(message.name, message.data)
        raise aiohttp.ClientPayloadError("the feed ended")

    def _apply(self, name: str, data: bytes) -> None:
        if name == "reset":
            raise ResyncError("the worker asks for a new snapshot")
        if name not in ("batch", "load"):
            return
        batch = decode_batch(data)
        self.fleet.apply_batch(self.url, batch, self.clock())
        self._position = (batch.epoch, batch.seq)
        self._failures = 0

    async def _take_snapshot(self) -> tuple[int, int]:
        async with (
            asyncio.timeout(self.policy.snapshot_timeout),
            self._get("/cache/state", {"Accept": MSGPACK}) as response,
        ):
            self._expect(response, MSGPACK)
            body = await self._bounded(response)
        snapshot: Snapshot
        if len(body) > self.policy.thread_bytes:
            snapshot = await asyncio.to_thread(decode_snapshot, body, MSGPACK)
        else:
            snapshot = decode_snapshot(body, MSGPACK)
        try:
            self.fleet.apply_snapshot(self.url, snapshot, self.clock())
        except (Mismatch, DuplicateWorker, AgentListed) as error:
            # The worker's blocks are not matched, but its load and liveness are followed. While the router's tokenizer
            # is being loaded this is routine; if it cannot be loaded the loader logs that.
            routine = error.reason is RejectReason.NO_TOKENIZER
            self._log("worker_unmatched", logging.INFO if routine else logging.ERROR, str(error))
            self.metrics.feed_refusals.labels(error.reason.value).inc()
        self.on_described(snapshot.info)
        return snapshot.info.epoch, snapshot.seq

    async def _bounded(self, response: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        while piece := await response.content.readany():
            size += len(piece)
            if size > self.policy.max_snapshot_bytes:
                raise EventTooLargeError(f"the snapshot takes more than {self.policy.max_snapshot_bytes} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    def _get(
        self, path: str, headers: dict[str, str]
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        policy = self.policy
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=policy.connect_timeout, sock_read=policy.idle_timeout)
        url = self._address + path + self._query
        return self.session.get(url, headers=headers, timeout=timeout, allow_redirects=False)

    def _expect(self, response: aiohttp.ClientResponse, content_type: str) -> None:
        if response.status in (404, 405, 501):
            raise NoFeedError
        if response.status != 200 or response.content_type != content_type:
            raise aiohttp.ClientPayloadError(f"{response.url.path}: {response.status} {response.content_type}")

    def _log(self, name: str, level: int, why: str) -> None:
        logger.log(level, name, worker=self.url, why=why)
