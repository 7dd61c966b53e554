"""The live document: how all routers and workers of one KVCluster are doing now, and how they did lately.

`GET /live` answers with one document, and `GET /live/events` keeps a reader's copy of it up to date (`updates`).
Seconds, unless a name says otherwise; `None` means that there is no value, never that it is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, TypeAlias

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from router.core.view import Trust
from router.core.worker_state import WorkerPhase

LARGEST = 2**53
"""Readers in JavaScript know no larger integer, and sums over all routers of what is no larger fit into 64 bits."""

Count: TypeAlias = Annotated[int, Field(ge=0, le=LARGEST)]
Number: TypeAlias = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class DocumentError(ValueError):
    """What should be a live document is none. The message names the first field that is wrong."""


class RouterPhase(StrEnum):
    """What a router does, as the router that was asked knows it."""

    SERVING = "serving"
    DRAINING = "draining"
    """It ends soon, and takes requests until others know."""
    CLOSING = "closing"
    """It takes no new requests, and finishes those that it has."""
    UNREACHABLE = "unreachable"
    """Its management port did not answer. `reason` says how; nothing else is known of it."""


@dataclass(frozen=True, slots=True)
class DiscoveryLive:
    """How well a router knows which workers there are."""

    source: str
    """`static`, `file`, `kubernetes`, ..."""
    age_seconds: Number | None
    """Since the list was last confirmed."""
    error: str | None
    """Why it is not confirmed now."""


@dataclass(frozen=True, slots=True)
class RouterLive:
    """One router."""

    name: str
    """Its pod's name in a cluster; else its host's."""
    url: str
    """Base URL of its management port; empty for the router that was asked."""
    state: RouterPhase
    ready: bool = False
    """A request would find a worker, at once or within the time that it waits for one."""
    reason: str | None = None
    """Why it is not ready, in words."""
    strategy: str = ""
    uptime_seconds: Number | None = None
    tokenizer: str = ""
    """State of its tokenizer, as in `GET /status`."""
    discovery: DiscoveryLive | None = None


@dataclass(frozen=True, slots=True)
class WorkerLive:
    """One worker, or one data-parallel rank of a process, as all routers together see it."""

    url: str
    """It identifies the worker."""
    worker_id: str
    """The id that it states; its URL until then."""
    pod: str
    """Empty if it is not known."""
    state: WorkerPhase
    """The worst that any router sees."""
    ready: bool
    """Every router that knows it sends it requests."""
    problem: str | None
    """Why it gets no requests, or why prompts are not matched against its cache, in words. Where routers differ, each
    begins with the router's name."""
    running: Count | None
    """Requests that its engine runs, by its own last report."""
    waiting: Count | None
    cache_fill: Number | None
    """Share of its GPU cache that is filled, cached blocks of no request included: 0..1."""
    blocks: Count
    """Blocks of its GPU cache that the view holds."""
    capacity: Count
    """Usable blocks; 0: not known."""
    view_age_seconds: Number | None
    """Whole seconds since the view was last confirmed, at the router where that is longest ago."""
    trust: Trust
    """The least of any router."""
    hit_rate: Number | None
    """Cached tokens over prompt tokens, of the answers that report both, since the routers started."""
    reuse_score: Number
    """Blocks that requests reused there lately, to two digits."""
    in_flight: Count
    """Requests of these routers that are with it."""
    requests: Count
    """Requests that these routers have sent to it."""


@dataclass(frozen=True, slots=True)
class QueueLive:
    """The requests of one class that wait in the routers, whose flow control holds them back."""

    name: str
    """Of the class."""
    priority: Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    """The least of its requests' priorities."""
    waiting: Count
    """Because all workers are busy, or none is ready."""
    held: Count
    """Of them, those that no ready worker serves."""
    oldest_seconds: Number | None
    """For which the one that came first has waited, to tenths; None: none waits."""
    shed: Count
    """Requests turned away instead, since the routers started."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all routers that answered, each since its start."""

    requests: Count
    """Requests answered."""
    errors: Count
    """Those answered with a status of 500 or more, and answers that broke off."""
    prompt_tokens: Count
    """Of the answers that report cached tokens."""
    cached_tokens: Count
    hit_rate: Number | None
    """cached_tokens / prompt_tokens."""
    prefill_seconds_saved: Number
    """GPU seconds that it would have taken to compute what was cached, by the corrected latency model."""
    gpus_saved: Number | None
    """Those of the time that `history` covers, for each second of it: as many GPUs that compute nothing else would be
    needed without the caches."""
    since_seconds: Number
    """Since the first of the routers started."""


@dataclass(frozen=True, slots=True)
class History:
    """The last minutes in steps of equal length, oldest first. All lists are equally long."""

    step_seconds: Number
    at: tuple[Count, ...] = ()
    """End of each step, in Unix seconds. Steps follow one another without gaps."""
    requests_per_second: tuple[Number | None, ...] = ()
    """None in all of these: no router measured that step, or there was nothing to measure."""
    hit_rate: tuple[Number | None, ...] = ()
    ttft_p50: tuple[Number | None, ...] = ()
    """Interpolated in the buckets of the routers' histograms."""
    ttft_p95: tuple[Number | None, ...] = ()
    tpot_p50: tuple[Number | None, ...] = ()
    tpot_p95: tuple[Number | None, ...] = ()
    load_skew: tuple[Number | None, ...] = ()
    """Requests on the ready worker that has most, over their mean: 1 is even."""
    prefill_seconds_saved: tuple[Number | None, ...] = ()
    """In each step."""


@dataclass(frozen=True, slots=True)
class DecisionLive:
    """Where one request went, and why. Blocks and seconds."""

    id: str
    """It identifies the decision: `<router's instance>:<number>`, numbers without gaps at each instance."""
    at: Number
    """Unix seconds."""
    router: str
    """Name of the router."""
    worker_id: str
    reason: str
    """A `DecisionReason`."""
    matched_blocks: Count
    prompt_blocks: Count
    predicted_ttft_seconds: Number
    queue_seconds: Number
    load_seconds: Number
    prefill_seconds: Number
    decode_seconds: Number
    """What the request and those beside it lose by decoding together, and, if it does not stream, its own decoding."""
    charge_seconds: Number
    """For computing what another worker has cached; negative where a further copy pays off."""


@dataclass(frozen=True, slots=True)
class Live:
    """The whole document."""

    at: Number
    """Unix seconds."""
    routers: tuple[RouterLive, ...]
    """The router that was asked first."""
    workers: tuple[WorkerLive, ...]
    """In the order of their URLs."""
    totals: Totals
    history: History
    decisions: tuple[DecisionLive, ...] = field(default=())
    """Newest first; bounded."""
    queues: tuple[QueueLive, ...] = ()
    """The most urgent class first; none: no router holds requests back."""


_DOCUMENT = TypeAdapter(Live)


def encode(document: Live) -> bytes:
    """JSON."""
    return orjson.dumps(document)


def decode(body: bytes) -> Live:
    """Inverse of `encode`. Fields that are not known are ignored. Raises `DocumentError`."""
    try:
        return _DOCUMENT.validate_json(body)
    except ValidationError as error:
        raise reported_error(error, "live document") from None


def reported_error(error: ValidationError, what: str) -> DocumentError:
    """The first thing that is wrong with what should be a `what`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return DocumentError(f"this is no {what}: {where + ': ' if where else ''}{first['msg']}")
