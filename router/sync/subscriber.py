"""Follows one worker's cache feed: a snapshot, then the stream of changes, for ever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from kvcache.feed import MSGPACK, FeedError, Snapshot, decode_batch, decode_snapshot, encode_position
from router.core.errors import AgentListed, DuplicateWorker, FeedGap, FeedRejected, Mismatch, RejectReason, StaleEpoch
from router.core.fleet import Fleet
from router.metrics import Metrics
from runtime.backoff import Backoff
from runtime.logs import event
from runtime.sse import EventTooLargeError, SseReader

logger = logging.getLogger(__name__)


class NoFeedError(Exception):
    """The worker serves no cache feed (404): a plain vLLM, say."""


class ResyncError(Exception):
    """The stream cannot be continued from where the view stands."""


@dataclass(frozen=True, slots=True)
class FeedPolicy:
    """Seconds and bytes."""

    reconnect: Backoff = Backoff(0.05, 1.0)
    """A restarted worker is found again within the longest of these delays."""
    silence: float = 3.0
    """A stream that brings nothing for so long is dropped: a worker reports its load every second."""
    connect_timeout: float = 2.0
    snapshot_timeout: float = 30.0
    max_snapshot_bytes: int = 256 * 2**20
    max_event_bytes: int = 8 * 2**20
    no_feed_retry: float = 30.0
    """How often a worker without a feed is asked again."""
    thread_bytes: int = 256 * 1024
    """Snapshots larger than this are decoded in a thread."""


class Subscriber:
    """One worker's feed, applied to the fleet.

    `up` is called when the feed answers, `ended` when a stream that was connected ends, `down(why)` when the feed
    cannot be reached. `vouches` says whether the feed
    currently shows that the worker lives; while it does not, `sync.liveness` asks the worker itself. A feed at an
    address of its own (`feed`: an agent's, beside the engine) never does: neither its answers nor their absence say
    anything about the engine.
    """

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        up: Callable[[], None],
        down: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
        feed: str | None = None,
        policy: FeedPolicy | None = None,
    ) -> None:
        self._url = url
        self._feed = feed or url
        self._own = feed is None
        self._fleet = fleet
        self._session = session
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._up = up
        self._down = down
        self._ended = ended
        self._policy = policy or FeedPolicy()
        self._position: tuple[int, int] | None = None
        self._failures = 0
        self._resumed_at = -math.inf
        """When a gap was last answered without a pause."""
        self._connected = False

    @property
    def vouches(self) -> bool:
        """The feed is connected, and it is the worker's own."""
        return self._connected and self._own

    def gone(self) -> None:
        """Nobody listens at the worker's address: whoever does next is another process, with another cache."""
        if self._own and not self._connected:
            self._position = None

    async def run(self) -> None:
        """Follow the feed until cancelled."""
        while True:
            try:
                await self._follow()
            except NoFeedError:
                self._log("no_feed", logging.INFO, "routed by load only")
                self._metrics.feed_connects.labels("no_feed").inc()
                self._connected = False
                await asyncio.sleep(self._policy.no_feed_retry)
                continue
            except (ResyncError, FeedGap, StaleEpoch) as error:
                self._log("feed_gap", logging.INFO, str(error))
                self._metrics.feed_gaps.inc()
                self._position = None
                now = self._clock()
                if self._failures == 0 and now - self._resumed_at > self._policy.reconnect.longest:
                    self._failures, self._resumed_at = 1, now
                    continue  # at once; if that does not help for long, after a pause
            except FeedRejected as error:
                self._log("feed_refused", logging.ERROR, str(error))
                self._metrics.feed_refusals.labels(error.reason.value).inc()
                self._position = None
            except (FeedError, EventTooLargeError) as error:
                self._log("feed_unreadable", logging.ERROR, str(error))
                self._metrics.feed_refusals.labels("malformed").inc()
                self._position = None
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._lost(error)
            except Exception as error:  # noqa: BLE001  # whatever one worker sends, the others' feeds go on
                self._log("feed_failed", logging.ERROR, repr(error))
                self._metrics.feed_refusals.labels("unexpected").inc()
                self._position = None
            finally:
                if self._connected:
                    self._connected = False
                    self._ended()
            await asyncio.sleep(self._policy.reconnect.delay(self._failures + 1, self._rng.random()))
            self._failures += 1

    def _lost(self, error: Exception) -> None:
        if self._failures == 0:
            self._log("feed_lost", logging.WARNING, repr(error))
        self._metrics.feed_connects.labels("failed").inc()
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        if isinstance(cause, ConnectionRefusedError):
            self._position = None  # nobody listens: whoever does next is another process
            if self._own:
                self._down("its feed refuses connections")

    async def _follow(self) -> None:
        if self._position is None:
            self._position = await self._take_snapshot()
        epoch, seq = self._position
        headers = {"Accept": "text/event-stream", "Last-Event-ID": encode_position(epoch, seq)}
        async with self._get("/cache/events", headers) as response:
            self._expect(response, "text/event-stream")
            self._metrics.feed_connects.labels("connected").inc()
            self._connected = True
            if self._own:
                self._up()
            reader = SseReader(self._policy.max_event_bytes)
            while piece := await response.content.readany():
                if self._own:
                    self._fleet.heard(self._url, self._clock())
                for message in reader.feed(piece):
                    self._apply(message.name, message.data)
        raise aiohttp.ClientPayloadError("the feed ended")

    def _apply(self, name: str, data: bytes) -> None:
        if name == "reset":
            raise ResyncError("the worker asks for a new snapshot")
        if name not in ("batch", "load"):
            return
        batch = decode_batch(data)
        self._fleet.apply_batch(self._url, batch, self._clock())
        self._position = (batch.epoch, batch.seq)
        self._failures = 0

    async def _take_snapshot(self) -> tuple[int, int]:
        async with (
            asyncio.timeout(self._policy.snapshot_timeout),
            self._get("/cache/state", {"Accept": MSGPACK}) as response,
        ):
            self._expect(response, MSGPACK)
            body = await self._bounded(response)
        snapshot: Snapshot
        if len(body) > self._policy.thread_bytes:
            snapshot = await asyncio.to_thread(decode_snapshot, body, MSGPACK)
        else:
            snapshot = decode_snapshot(body, MSGPACK)
        try:
            self._fleet.apply_snapshot(self._url, snapshot, self._clock())
        except (
            Mismatch,
            DuplicateWorker,
            AgentListed,
        ) as error:  # its blocks are not matched, but its load and life are followed
            # While the tokenizer is being loaded this says nothing about the worker; that it cannot be is logged there.
            routine = error.reason is RejectReason.NO_TOKENIZER
            self._log("worker_unmatched", logging.INFO if routine else logging.ERROR, str(error))
            self._metrics.feed_refusals.labels(error.reason.value).inc()
        return snapshot.info.epoch, snapshot.seq

    async def _bounded(self, response: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        while piece := await response.content.readany():
            size += len(piece)
            if size > self._policy.max_snapshot_bytes:
                raise EventTooLargeError(f"the snapshot takes more than {self._policy.max_snapshot_bytes} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    def _get(
        self, path: str, headers: dict[str, str]
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        policy = self._policy
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=policy.connect_timeout, sock_read=policy.silence)
        return self._session.get(self._feed + path, headers=headers, timeout=timeout, allow_redirects=False)

    def _expect(self, response: aiohttp.ClientResponse, content_type: str) -> None:
        if response.status in (404, 405, 501):
            raise NoFeedError
        if response.status != 200 or response.content_type != content_type:
            raise aiohttp.ClientPayloadError(f"{response.url.path}: {response.status} {response.content_type}")

    def _log(self, name: str, level: int, why: str) -> None:
        event(logger, level, name, worker=self._url, why=why)
