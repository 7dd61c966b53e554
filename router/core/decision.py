"""What is asked of the router and what it answers: plain frozen values, and a ring of the latest decisions.

Logs, metrics, response headers and the explain endpoint all read the one `Decision`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kvcache.keys import PrefixKeys


class NoWorkerReady(RuntimeError):
    """No worker may take the request now. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Reason(StrEnum):
    """Why this worker. `docs/routing.md` shows when each is given."""

    PREFIX_MATCH = "prefix_match"
    """Nobody holds more of the prompt than the chosen worker, and it holds at least one block."""
    LOAD_OVER_PREFIX = "load_over_prefix"
    """Another worker holds more of the prompt, but waiting for it costs more than its cache saves."""
    NO_MATCH = "no_match"
    """No candidate holds any of the prompt: the cheapest (or, for longest_prefix, the next in turn)."""
    NO_PREFIX = "no_prefix"
    """There was nothing to match: the prompt has no reusable full block, or no candidate's view may be used."""
    LONGEST_PREFIX = "longest_prefix"
    """The worker with the longest match, whatever its load (strategy longest_prefix)."""
    ROUND_ROBIN = "round_robin"
    """The worker that has waited longest for its turn (strategy round_robin)."""
    LEAST_LOADED = "least_loaded"
    """The worker with the fewest requests in flight (strategy least_loaded)."""
    ONLY_CANDIDATE = "only_candidate"
    """No other worker may take the request."""


class Unread(StrEnum):
    """Why a prompt was not read: its request goes by load. Label of `kvcluster_router_prompts_unread_total`."""

    UNREADABLE = "unreadable"
    """The body or its prompt is not what this API takes, or is in a form that is not understood here."""
    TOO_LONG = "too_long"
    """No worker takes so many tokens."""
    BUSY = "busy"
    """Longer or earlier prompts kept the router from reading it in time."""
    NO_TOKENIZER = "no_tokenizer"
    """The tokenizer is not loaded."""


@dataclass(frozen=True, slots=True)
class ReportedSequence:
    """The one of a request's sequences whose cached tokens its answer reports, where it is not the first prompt."""

    keys: PrefixKeys
    reusable_blocks: int
    """Leading blocks that may be reused: never the block of the last token."""
    fresh_blocks: int
    """Of these, what the request's sequences before it will have computed."""


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What the router knows of a request when it decides.

    `keys` are the prompt's block keys, None when the prompt could not be tokenised here; `prompt_tokens` counts
    the whole prompt (None: unknown). A `streaming` request shows its first token, others only their end.
    `output_tokens` is an upper bound of what will be generated (max_tokens), where stated.
    """

    keys: PrefixKeys | None
    prompt_tokens: int | None
    streaming: bool
    model: str | None = None
    output_tokens: int | None = None
    prompted: bool = True
    """Whether it has a prompt. A list of models, say, has none: sending that somewhere is no decision to count."""
    reported: ReportedSequence | None = None
    """Whose cached tokens the answer will report; None: those of the prompt of `keys`."""
    unread: Unread | None = None
    """Why `keys` is None, where there is a prompt."""


class CandidateView(NamedTuple):
    """The figures of one worker that could have taken the request. Seconds and blocks."""

    worker_id: str
    url: str
    matched_blocks: int
    """Leading blocks of the prompt it holds (or is about to) and may reuse: never the block of the last token."""
    queue_seconds: float
    """Time until it would start on this request, `memory_seconds` included."""
    memory_seconds: float
    """The part of the queue that waits for blocks to be released."""
    prefill_seconds: float
    """Time to the first token from then on."""
    decode_seconds: float
    """Time from the first token to the end."""
    cost: float
    """What strategy cache_aware compares, in seconds: queue, prefill and the charge for computing blocks again."""
    in_flight: int
    """Requests on the worker: this router's, and others' that its last report knew of."""
    assigned_seconds: float
    """Prefill work this router gave it lately (decayed)."""
    turn: int
    """Number of the dispatch that it last got; the smallest has waited longest."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes and why, with what every candidate would have cost."""

    worker_id: str
    url: str
    strategy: str
    reason: Reason
    matched_blocks: int
    prompt_blocks: int
    """Blocks of the prompt, a last partial one included."""
    predicted_ttft: float
    """queue_seconds + prefill_seconds of the chosen worker."""
    queue_seconds: float
    prefill_seconds: float
    candidates: tuple[CandidateView, ...]
    """In the order in which the workers joined; the chosen one among them."""
    reported_blocks: int
    """Cached blocks that the answer is expected to report: `matched_blocks`, but for requests of several sequences."""


KEPT = 20


class RecentDecisions:
    """A ring of the latest decisions that were carried out."""

    __slots__ = ("_ring",)

    def __init__(self, kept: int = KEPT) -> None:
        self._ring: deque[tuple[float, Decision]] = deque(maxlen=kept)

    def note(self, decision: Decision, now: float) -> None:
        """One more request went where this decision says."""
        self._ring.append((now, decision))

    def newest_first(self, now: float) -> Iterator[tuple[float, Decision]]:
        """Each with its age in seconds."""
        return ((now - at, decision) for at, decision in reversed(self._ring))
