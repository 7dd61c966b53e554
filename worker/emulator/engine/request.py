"""Input and output of an engine: requests, tokens, records of finished requests, counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvcache.keys import DEFAULT_SCOPE, CacheScope, Image, PrefixKeys

FinishReason = Literal["stop", "length", "abort"]


class RequestRefusedError(ValueError):
    """The engine cannot run the request; the message says why. The engine is unchanged."""


class TokenSource(Protocol):
    """Supplies the tokens that a model would have sampled for one request."""

    def token(self, index: int) -> int | None:
        """The id of generated token number `index`, counted from 0. None if it is not ready: the sequence then gets no
        token in this step and asks again at the end of the next. Called with each index in turn; must not raise or
        block."""


@dataclass(slots=True)
class EngineRequest:
    """One sequence to prefill and decode, as it is submitted.

    `request_id` is unique among the engine's unfinished requests. The output ends at `max_tokens` or at the engine's
    `max_model_len`; once it has `min_tokens`, also with the end-of-sequence token (unless `ignore_eos`) or with one of
    `stop_token_ids`.
    """

    request_id: str
    prompt: Sequence[int]
    max_tokens: int
    source: TokenSource
    scope: CacheScope = DEFAULT_SCOPE
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    images: Sequence[Image] = ()
    """Where the images of the prompt begin, in order, and what identifies them."""
    image_tokens: int = 0
    """Tokens of the prompt that stand for one image."""
    read_cache: bool = True
    """If false, the whole prompt is computed even if blocks are cached. Its own blocks are cached as usual."""
    unread: bool = False
    """Nobody reads its tokens: there are outputs of the first and the last one alone, and the others are asked for when
    a block of them is full. `source` has all of them ready, and none of them ends the output."""
    keys: PrefixKeys | None = None
    """The keys of the prompt in its scope, if the caller has computed all of them; None: they are computed here."""


@dataclass(slots=True)
class Output:
    """One generated token. It is a value, but not frozen, which would triple the cost of making one for every token."""

    request_id: str
    token: int
    index: int
    """0 for the first token."""
    at: float
    """End of the step that generated it, in the caller's seconds."""
    finish_reason: FinishReason | None
    """None unless this is the last token."""
    cached_tokens: int
    """Prompt tokens that were cached when the request was first scheduled (vLLM rule 17)."""


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Times of one request, in the caller's seconds; None if it did not get so far. The intervals are vLLM's (rule
    18)."""

    arrival: float
    scheduled: float | None
    """Start of the first step that computed tokens of it."""
    first_token: float | None
    last_token: float | None
    finished: float

    @property
    def queue(self) -> float | None:
        """Seconds in the queue, until the first step."""
        return _interval(self.arrival, self.scheduled)

    @property
    def prefill(self) -> float | None:
        return _interval(self.scheduled, self.first_token)

    @property
    def decode(self) -> float | None:
        return _interval(self.first_token, self.last_token)

    @property
    def inference(self) -> float | None:
        return _interval(self.scheduled, self.last_token)

    @property
    def ttft(self) -> float | None:
        return _interval(self.arrival, self.first_token)

    @property
    def e2e(self) -> float:
        return self.finished - self.arrival


def _interval(start: float | None, end: float | None) -> float | None:
    return end - start if start is not None and end is not None else None


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """The record of a request that has ended, for whatever reason."""

    request_id: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were cached when it was first scheduled."""
    output_tokens: int
    max_tokens: int
    preemptions: int
    times: RequestTimes

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between two tokens (TPOT); None for fewer than two tokens."""
        decode = self.times.decode
        return decode / (self.output_tokens - 1) if decode is not None and self.output_tokens > 1 else None


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made, as vLLM counts them (rule 16)."""

    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the cache, at the first admission."""
    prefix_cache_hits: int = 0
    """Those of them that were found on the GPU."""
    external_cache_queries: int = 0
    """Prompt tokens beyond the hits on the GPU that were looked up in the CPU tier."""
    external_cache_hits: int = 0
    """Those of them that were found there."""
    loaded_blocks: int = 0
    """Blocks that were loaded from the CPU."""
    load_seconds: float = 0.0
    """Seconds that these loads took, without waiting for one another."""
    prefilled: int = 0
    """Requests that have had their first token."""
    prompt_tokens: int = 0
    """Prompt tokens of these requests."""
    cached_prompt_tokens: int = 0
    """Those of them that came from the cache."""
    loaded_prompt_tokens: int = 0
    """Those of the cached ones that came from the CPU."""
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    """Sum of the steps' durations."""
    step_tokens: Counter[int] = field(default_factory=Counter)
    """Number of steps by the number of tokens that they computed."""
    finished: Counter[FinishReason] = field(default_factory=Counter)
