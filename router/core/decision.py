"""The question to the router and its answer, as plain frozen values, and a ring of the latest decisions.

Logs, metrics, response headers and the explain endpoint all read the one `Decision`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from kvcache.feed import Tier
from kvcache.keys import PrefixKeys
from router.core.sessions import Session

BYTES_OF_A_TOKEN = 4
"""Of a request's body, about: by this a prompt is counted that was not read."""


class NoWorkerReady(RuntimeError):
    """No worker can take the request now. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DecisionReason(StrEnum):
    """Why this worker was chosen. `docs/routing.md` shows when each reason is given."""

    PREFIX_MATCH = "prefix_match"
    """No candidate holds more of the prompt than the chosen worker, which holds at least one block of it."""
    LOAD_OVER_PREFIX = "load_over_prefix"
    """Another candidate holds more of the prompt, but waiting for it costs more than its cache saves."""
    NO_MATCH = "no_match"
    """No candidate holds any of the prompt: the cheapest was chosen (or, for longest_prefix, the next in turn)."""
    NO_PREFIX = "no_prefix"
    """There was nothing to match: the prompt has no reusable full block, or no candidate's view can be used."""
    LONGEST_PREFIX = "longest_prefix"
    """The worker with the longest match, whatever its load (strategy longest_prefix)."""
    ROUND_ROBIN = "round_robin"
    """The worker that has waited longest for its turn (strategy round_robin)."""
    LEAST_LOADED = "least_loaded"
    """The worker with the fewest requests in flight (strategy least_loaded)."""
    LMETRIC = "lmetric"
    """The smallest product of prefill to come and requests (strategy lmetric)."""
    LINEAR = "linear"
    """The smallest sum of blocks to compute and blocks in use (strategy linear)."""
    ONLY_CANDIDATE = "only_candidate"
    """No other worker can take the request."""
    STORED_RESPONSE = "stored_response"
    """The request is about an earlier response, which only this worker stores."""


class Unread(StrEnum):
    """Why a prompt was not read, so that its request is routed by load.

    Label `why` of `kvcluster_router_prompts_unread_total`.
    """

    UNREADABLE = "unreadable"
    """The body or its prompt is not what this API takes, or has a form that the router does not know."""
    TOO_LONG = "too_long"
    """The prompt has more tokens than any worker takes."""
    BUSY = "busy"
    """Earlier or longer prompts kept the router from reading it in time."""
    NO_TOKENIZER = "no_tokenizer"
    """The tokenizer is not loaded."""


@dataclass(frozen=True, slots=True)
class ReportedSequence:
    """The sequence whose cached tokens the answer reports, if that is not the first prompt of the request."""

    keys: PrefixKeys
    reusable_blocks: int
    """Leading blocks that may be reused: never the block of the last token."""
    fresh_blocks: int
    """How many of these the earlier sequences of the same request will have computed."""


class StoredResponse(NamedTuple):
    """An earlier response that a request is about."""

    name: str
    """Its id."""
    tag: str | None
    """Which worker stores it (`core.stored_responses`); None if the id does not say so."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and how urgent it is: what flow control orders waiting requests by."""

    tenant: str = ""
    """Among the tenants of one priority capacity is divided fairly; empty: the one of all requests that state none."""
    priority: int = 0
    """The larger goes first; negative: the first to be turned away."""
    objective: str = ""
    """Name of the `InferenceObjective` that gives the priority; empty: none was named."""


ANYONE = Caller()
"""Who sends a request that says nothing about it."""


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What the router knows of a request when it decides.

    `keys` are the block keys of the prompt, None if it could not be tokenised here; `prompt_tokens` counts the whole
    prompt (None: unknown). The first token of a `streaming` request can be observed; of others only the end can.
    `output_tokens` is an upper bound of the answer's length (max_tokens), if the request states one.
    """

    keys: PrefixKeys | None
    prompt_tokens: int | None
    streaming: bool
    model: str | None = None
    output_tokens: int | None = None
    prompted: bool = True
    """Whether it has a prompt. A request for the list of models, say, has none, and its decision is not counted."""
    reported: ReportedSequence | None = None
    """The sequence whose cached tokens the answer will report; None: the prompt of `keys`."""
    unread: Unread | None = None
    """Why `keys` is None although there is a prompt."""
    session: Session | None = None
    """The session that it belongs to, if it states one."""
    stored: StoredResponse | None = None
    """The earlier response that it is about: only the worker that stores it can answer."""
    stores: bool = False
    """The worker may store its response, whose id has to say where that is."""
    rank: int | None = None
    """Data-parallel rank that the client asks for; None: any."""
    output_hint: int | None = None
    """Tokens that the client expects of the answer, if it says so."""
    caller: Caller = ANYONE
    """Who sends it."""


class Candidate(NamedTuple):
    """One worker that could take the request, and what the request would cost there. Seconds and blocks."""

    worker_id: str
    url: str
    matched_blocks: int
    """Leading blocks of the prompt that it holds (or soon will) and may reuse: never the block of the last token,
    unless that is loaded from a slower tier."""
    loaded_blocks: Mapping[Tier, int]
    """Those of them that it would load from each slower tier."""
    queue_seconds: float
    """Time until it would start on this request, including `memory_seconds`."""
    load_seconds: float
    """Time from then until these blocks are loaded."""
    memory_seconds: float
    """The part of `queue_seconds` that waits for blocks to be released."""
    prefill_seconds: float
    """Time from the start to the first token."""
    decode_seconds: float
    """Time from the first token to the end."""
    slowdown_seconds: float
    """How much longer it and the requests on the worker decode because of one another, all together."""
    cost: float
    """What strategy cache_aware compares: queue, load, prefill, slowdown and the charge for computing blocks again, in
    seconds; of a request that does not stream also its decoding and the wait of those beside it for its prefill."""
    charge_seconds: float
    """The part of `cost` that is charged for computing what another candidate has cached; negative where a further copy
    pays off."""
    active_blocks: int
    """Blocks in use there once the request runs: its own and those of the requests in flight."""
    in_flight: int
    """Requests on the worker: those of this router, and those of others in the worker's last report."""
    assigned_seconds: float
    """Prefill that this router gave it lately, decayed (`FleetConfig.assigned_half_life`)."""
    turn: int
    """Number of the last dispatch to it; the smallest number has waited longest."""

    @property
    def decode_cost(self) -> float:
        """The part of `cost` that is neither queue, load, prefill nor charge: what decoding together takes longer, and,
        if the request does not stream, its own decoding and what its prefill makes others wait."""
        rest = self.cost - self.queue_seconds - self.load_seconds - self.prefill_seconds - self.charge_seconds
        return rest if rest > 1e-9 else 0.0  # below that it is what rounding left of a sum


class CacheUse(StrEnum):
    """How much of a prompt the chosen worker held, as the router saw it: what times are compared by."""

    HIT = "hit"
    """At least half of its blocks."""
    PARTIAL = "partial"
    """Some, but less than half: a system prompt, say."""
    MISS = "miss"
    """None."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes and why, with the cost on every candidate."""

    worker_id: str
    url: str
    strategy: str
    reason: DecisionReason
    matched_blocks: int
    prompt_blocks: int
    """Blocks of the prompt, including a last partial one."""
    predicted_ttft: float
    """queue_seconds + load_seconds + prefill_seconds of the chosen worker."""
    queue_seconds: float
    prefill_seconds: float
    candidates: tuple[Candidate, ...]
    """In the order in which the workers joined, including the chosen one. In a large fleet only the chosen one, unless
    all of them were asked for."""
    best_blocks: int
    """The most blocks of the prompt that any candidate holds."""
    reported_blocks: int
    """Cached blocks that the answer is expected to report; for requests of one sequence that is `matched_blocks`."""
    rank: int | None = None
    """Data-parallel rank that the request has to name; None: the worker's process has one only."""
    loaded_blocks: Mapping[Tier, int] = field(default_factory=dict)
    """Those of `matched_blocks` that the worker loads from each slower tier."""

    @property
    def cache_use(self) -> CacheUse:
        """The class of this request. A prompt that was not read is a miss: nothing of it was looked for."""
        if not self.matched_blocks:
            return CacheUse.MISS
        return CacheUse.HIT if 2 * self.matched_blocks >= self.prompt_blocks else CacheUse.PARTIAL


class DecisionPhase(StrEnum):
    """A part of the time from a request's arrival to its dispatch. The phases of a request add up to that time."""

    READ = "read"
    """The body is parsed, and waits for its turn if it is long."""
    TOKENIZE = "tokenize"
    """The chat template and the tokenizer run."""
    HASH = "hash"
    """Block keys are computed, whenever they are needed."""
    LOOKUP = "lookup"
    """The index is searched for them."""
    CHOOSE = "choose"
    """The cost on each candidate is computed, one is chosen, and the request is accounted to it."""


KEPT = 20


class RecentDecisions:
    """A ring of the latest decisions that were carried out."""

    __slots__ = ("_ring", "noted")

    def __init__(self, kept: int = KEPT) -> None:
        self._ring: deque[tuple[float, Decision]] = deque(maxlen=kept)
        self.noted = 0
        """How many there have been, which is the number of the newest."""

    def note(self, decision: Decision, now: float) -> None:
        """A decision was carried out."""
        self._ring.append((now, decision))
        self.noted += 1

    def newest_first(self, now: float) -> Iterator[tuple[float, Decision]]:
        """The decisions, each with its age in seconds."""
        return ((now - at, decision) for at, decision in reversed(self._ring))
