"""The management port: health, metrics, workers, decisions explained, and what workers push. FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from typing import Annotated, Any

import orjson
from fastapi import Depends, FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from kvcache.errors import error_body
from kvcache.feed import JSON, MSGPACK, FeedError, decode_eviction, decode_heartbeat, decode_snapshot
from kvcache.ranks import RANK_HEADER, asked_rank, split_rank
from router.core.decision import NoWorkerReady, RecentDecisions
from router.core.errors import FeedRejected, RejectReason
from router.core.fleet import Fleet, WorkerStatus
from router.discovery.sources import DiscoveryStatus
from router.live.document import DiscoveryLive, RouterLive, RouterPhase
from router.metrics import Metrics, by_label, total
from router.server.affinity import ANY_CALLERS, RESPONSES, Callers, with_headers
from router.server.explanation import block_texts, explanation
from router.server.models import served_models
from router.server.prompts import CHAT, COMPLETIONS, PROMPTED, PromptReader
from router.server.tokenizer_loader import TokenizerLoader

RECHECK_INTERVAL = 0.5
"""Seconds between two looks at what sends no notification of its changes: the tokenizer, the list of workers, the
router's own state."""
PROBES = frozenset({"/health", "/ready", "/started"})
"""Paths that the kubelet asks, which has no token."""
THREAD_BYTES = 256 * 1024
"""A pushed cache state of more bytes than this is decoded in a thread."""


class PushedByBrowserError(Exception):
    """What only workers may push came from a browser."""


def refuse_browsers(request: Request) -> None:
    """Raises `PushedByBrowserError` for a request that a browser sends.

    People open this port's page in their browser, where any other page could send requests here too, say the heartbeat
    of a worker of its own. Workers send neither header.
    """
    if "origin" in request.headers or "sec-fetch-site" in request.headers:
        raise PushedByBrowserError("what workers push is not taken from a browser")


class RouterState(Enum):
    """The state of the router's process."""

    SERVING = auto()
    """From its start until SIGTERM. Whether it is ready is another question (`GET /ready`)."""
    DRAINING = auto()
    """The process was told to stop and takes requests until others know. Its readiness does not change: a Service that
    has no other endpoint sends requests to a terminating endpoint, but only while that endpoint is ready."""
    CLOSING = auto()
    """The process takes no new requests and finishes those in flight."""


class RouterEvent(Enum):
    """What moves the router's process towards its end."""

    SIGTERM = auto()
    DRAINED = auto()
    """Others know that the process ends, or the time for that is over."""


ROUTER_TRANSITIONS: Mapping[tuple[RouterState, RouterEvent], RouterState] = {
    (RouterState.SERVING, RouterEvent.SIGTERM): RouterState.DRAINING,
    (RouterState.DRAINING, RouterEvent.DRAINED): RouterState.CLOSING,
}


@dataclass(slots=True)
class Management:
    """What the management endpoints read and change.

    `pod(url)` gives the name of the pod at a worker's URL, empty if there is none. `request_wait`: seconds for which
    requests wait for a worker. `callers`: how requests say who sends them.
    """

    fleet: Fleet
    prompts: PromptReader
    metrics: Metrics
    registry: CollectorRegistry
    clock: Callable[[], float]
    changed: asyncio.Event
    recent: RecentDecisions
    discovery: Callable[[], DiscoveryStatus]
    tokenizer: TokenizerLoader
    tokenizers: Mapping[str, TokenizerLoader]
    """Those of further models, by model."""
    pod: Callable[[str], str]
    request_wait: float = 0.0
    callers: Callers = ANY_CALLERS
    api_keys: Callable[[], Mapping[str, object]] | None = None
    """How well the API keys of the data port are known; None: none are asked for."""
    holds: bool = False
    """Whether requests are held while no worker is ready: then the router is ready without any."""
    state: RouterState = RouterState.SERVING

    def app(self) -> FastAPI:
        """The ASGI app."""
        app = FastAPI(title="KVCluster router", openapi_url="/openapi.json")
        app.add_exception_handler(FeedError, self._malformed)
        app.add_exception_handler(FeedRejected, self._rejected)
        route = app.add_api_route
        route("/health", self.health, methods=["GET"])
        route("/ready", self.ready, methods=["GET"])
        route("/started", self.started, methods=["GET"])
        route("/metrics", self.scrape, methods=["GET"])
        route("/status", self.status, methods=["GET"])
        route("/workers", self.workers, methods=["GET"])
        route("/workers/{worker_id:path}/blocks", self.blocks, methods=["GET"])
        route("/route/explain", self.explain, methods=["POST"])
        app.add_exception_handler(PushedByBrowserError, self._browser)
        workers_only = [Depends(refuse_browsers)]
        route("/internal/heartbeat", self.heartbeat, methods=["POST"], dependencies=workers_only)
        route("/internal/sync", self.sync, methods=["POST"], dependencies=workers_only)
        route("/internal/eviction", self.eviction, methods=["POST"], dependencies=workers_only)
        return app

    def advance(self, event: RouterEvent) -> None:
        """Every change of the router's state. Raises `KeyError` if `event` cannot happen in this state."""
        self.state = ROUTER_TRANSITIONS[self.state, event]

    # --- state ---

    async def health(self) -> Response:
        """200 as long as the event loop runs."""
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """200 when a request would find a worker, at once or within the time that it waits for one; else 503 and why.

        A router that holds requests until a worker has started (`--hold-seconds`) is ready without any worker.

        The waiting counts because all routers lose the last worker at the same moment when it is replaced: a Service
        without ready endpoints would refuse clients whom the routers let wait.

        When discovery fails after its first list, the body changes but never the status: the last known list is the
        best there is, and whether the workers on it are alive is asked of the workers.
        """
        page = self._readiness()
        return _json(page, 200 if page["ready"] else 503)

    async def started(self, wait: Annotated[float, Query(ge=0, le=3600)] = 0.0) -> Response:
        """200 with the body of `/ready`: as soon as `/ready` answers 200, or after `wait` seconds.

        For startup probes: Kubernetes asks no other probe before this one has succeeded, so a router that starts before
        its first worker is not recorded as failing.
        """
        return _json(await self.until_ready(wait))

    async def until_ready(self, seconds: float = math.inf) -> dict[str, Any]:
        """The body of `/ready`: as soon as that answers 200 or the router stops, or after so many seconds."""
        end = self.clock() + seconds
        while not (page := self._readiness())["ready"] and self.state is RouterState.SERVING:
            if (left := end - self.clock()) <= 0:
                break
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, RECHECK_INTERVAL)):
                    await self.changed.wait()
        return page

    def _readiness(self, workers: Sequence[WorkerStatus] | None = None) -> dict[str, Any]:
        discovery, now, ready_at = self.discovery(), self.clock(), self.fleet.ready_at
        if workers is None:
            workers = self.fleet.workers(now)
        ready = sum(worker.ready for worker in workers)
        waits = ready_at is not None and now - ready_at <= self.request_wait
        if self.state is RouterState.CLOSING:
            why = "the router is shutting down"
        elif self.tokenizer.awaited:
            why = "the tokenizer is being loaded"
        elif not discovery.known:
            why = f"the workers are not known yet: {discovery.error or 'their list has not been read'}"
        elif not ready and not waits and not self.holds:
            why = "no worker is ready" if workers else "no worker is known"
        else:
            why = None
        page = {"ready": why is None, "workers_ready": ready, "reason": why, "discovery": discovery.public()}
        return page if self.api_keys is None else {**page, "api_keys": self.api_keys()}

    def described(self, name: str, started: float, workers: Sequence[WorkerStatus]) -> RouterLive:
        """This router, as the live document shows it."""
        readiness, discovery = self._readiness(workers), self.discovery()
        return RouterLive(
            name,
            url="",
            state=RouterPhase(self.state.name.lower()),
            ready=readiness["ready"],
            reason=readiness["reason"],
            strategy=self.fleet.config.strategy,
            uptime_seconds=float(int(self.clock() - started)),
            tokenizer=self.tokenizer.status.state.value,
            discovery=DiscoveryLive(
                discovery.source,
                float(int(discovery.age)) if discovery.age is not None else None,
                discovery.error or None,
            ),
        )

    async def status(self) -> Response:
        """How this router is doing, for the controller and for people. docs/router.md names the fields.

        The counts are the metrics' own, since the start of the process: nothing is counted twice.
        """
        now = self.clock()
        workers = self.fleet.workers(now)
        ready = [worker for worker in workers if worker.ready]
        matching = [worker for worker in ready if worker.matching]
        page = {
            "strategy": self.fleet.config.strategy,
            "draining": self.state is not RouterState.SERVING,
            "workers": {
                "known": len({split_rank(worker.url)[0] for worker in workers}),
                "ready": _whole(ready, workers),
                "matching": _whole(matching, workers),
            },
            "history_workers": _whole([worker for worker in ready if worker.history], workers),
            "ranks": {"known": len(workers), "ready": len(ready), "matching": len(matching)},
            "view_age_seconds": max((worker.view_age for worker in ready if worker.view_age is not None), default=None),
            "prompt_tokens": int(total(self.metrics.reported_prompt)),
            "cached_tokens": int(total(self.metrics.actual_cached)),
            "decisions": {reason: int(count) for reason, count in by_label(self.metrics.decisions).items()},
            "recent": [
                {
                    "age_seconds": age,
                    "worker_id": decision.worker_id,
                    "reason": decision.reason.value,
                    "matched_blocks": decision.matched_blocks,
                    "prompt_blocks": decision.prompt_blocks,
                    "predicted_ttft_seconds": decision.predicted_ttft,
                }
                for age, decision in self.recent.newest_first(now)
            ],
            "discovery": self.discovery().public(),
            "tokenizer": self.tokenizer.status.public(),
            "tokenizers": {model: loader.status.public() for model, loader in self.tokenizers.items()},
            "models": served_models(workers),
            "reuse_score": {worker.worker_id: worker.reuse_score for worker in workers},
        }
        if self.api_keys is not None:
            page["api_keys"] = self.api_keys()
        return _json(page)

    async def scrape(self) -> Response:
        """Prometheus's text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def workers(self) -> Response:
        """Every worker as the router sees it."""
        workers = self.fleet.workers(self.clock())
        return _json({"workers": [{**asdict(worker), "pod": self.pod(worker.url)} for worker in workers]})

    async def blocks(self, worker_id: str) -> Response:
        """The blocks that this worker holds as the router sees it (a key once for each physical block), and as of when.

        At the same epoch and seq they equal those of the worker's own `GET /cache/state`.
        """
        for worker in self.fleet.workers(self.clock()):
            if worker.worker_id == worker_id:
                held = self.fleet.held_blocks(worker.url)
                keys = [key.hex() for key, count in held.items() for _ in range(count)]
                return _json({"worker_id": worker_id, "epoch": worker.epoch, "seq": worker.seq, "keys": keys})
        return _error(404, f"no worker is called {worker_id!r}; GET /workers lists them", "NotFoundError")

    async def explain(self, request: Request) -> Response:
        """The decision that a request with this body, for the path `?path=`, would get now. Nothing is sent and nothing
        is counted."""
        body = await request.body()
        fields = _fields(body)
        if fields is None:
            return _error(400, "the body is that of a request for a completion: a JSON object", "BadRequestError")
        path = request.query_params.get("path") or _likely_path(fields)
        if path not in PROMPTED:
            return _error(400, f"path is one of {', '.join(sorted(PROMPTED))}", "BadRequestError")
        route = with_headers(await self.prompts.read(path, body), request.headers.raw, self.callers)
        if (named := request.headers.get(RANK_HEADER)) is not None:
            route = replace(route, rank=asked_rank(named))
        now = self.clock()
        try:
            decision = self.fleet.choose(route, now, explain=True)
        except NoWorkerReady as error:
            return _error(503, str(error), "ServiceUnavailableError")
        size, texts, workers = self.fleet.config.block_size, None, self.fleet.workers(now)
        tokenizer, _ = self.prompts.known(route.model)
        if route.keys is not None and tokenizer is not None:
            texts = await asyncio.to_thread(block_texts, route.keys, tokenizer, size)
        return _json(explanation(decision, route, workers, size, texts))

    # --- push ---

    async def heartbeat(self, request: Request) -> Response:
        """A sign of life with the worker's load. `resync` asks the worker for its full state at once."""
        beat = decode_heartbeat(await request.body())
        resync = self.fleet.apply_heartbeat(beat, self.clock())
        self.changed.set()
        return _json({"resync": resync})

    async def sync(self, request: Request) -> Response:
        """The worker's full cache state, in JSON or msgpack."""
        media_type = request.headers.get("content-type", JSON).partition(";")[0].strip()
        body = await request.body()
        decode = functools.partial(decode_snapshot, body, MSGPACK if media_type == MSGPACK else JSON)
        snapshot = await asyncio.to_thread(decode) if len(body) > THREAD_BYTES else decode()
        self.fleet.apply_sync(snapshot, self.clock())
        return _json({})

    async def eviction(self, request: Request) -> Response:
        """Blocks the worker evicted since its last sync."""
        self.fleet.apply_eviction(decode_eviction(await request.body()), self.clock())
        return _json({})

    async def _browser(self, request: Request, error: Exception) -> Response:
        return _error(403, str(error), "PermissionDeniedError")

    async def _malformed(self, request: Request, error: Exception) -> Response:
        self.metrics.feed_refusals.labels(RejectReason.MALFORMED.value).inc()
        return _error(400, str(error), "BadRequestError", reason=RejectReason.MALFORMED.value)

    async def _rejected(self, request: Request, error: Exception) -> Response:
        reason = error.reason if isinstance(error, FeedRejected) else RejectReason.MALFORMED
        self.metrics.feed_refusals.labels(reason.value).inc()
        status = 404 if reason is RejectReason.UNKNOWN_WORKER else 409
        return _error(status, str(error), "FeedRejected", reason=reason.value)


def _whole(chosen: Iterable[WorkerStatus], workers: Iterable[WorkerStatus]) -> int:
    """How many processes there are of which every data-parallel rank is among those chosen."""
    urls = {worker.url for worker in chosen}
    return len({split_rank(url)[0] for url in urls} - {split_rank(w.url)[0] for w in workers if w.url not in urls})


def _fields(body: bytes) -> dict[str, Any] | None:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


def _json(content: dict[str, Any], status: int = 200) -> Response:
    # The names of tiers are strings of a class of their own.
    return Response(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS), status, media_type=JSON)


def _error(status: int, message: str, kind: str, *, reason: str | None = None) -> Response:
    body = error_body(message, kind, None, status)
    if reason is not None:
        body["error"]["reason"] = reason
    return _json(body, status)


def _likely_path(fields: Mapping[str, Any]) -> str:
    """Where a client would send this body. A body of the Messages API looks like a chat's."""
    if "messages" in fields:
        return CHAT
    return RESPONSES if "input" in fields else COMPLETIONS
