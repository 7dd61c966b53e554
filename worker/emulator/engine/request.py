"""What goes into an engine and what comes out of it: requests, tokens, records of finished requests, counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvcache.keys import DEFAULT_SCOPE, CacheScope

FinishReason = Literal["stop", "length", "abort"]


class RequestRefusedError(ValueError):
    """The engine cannot run this request; the message says why. The engine is unchanged."""


class TokenSource(Protocol):
    """What a model would have sampled for one request."""

    def token(self, index: int) -> int | None:
        """Id of the `index`-th generated token, 0 first. None = not ready yet: the sequence gets no token from this
        step and is asked again at the end of the next. Called with each index in turn; must not raise or block."""


@dataclass(slots=True)
class EngineRequest:
    """One sequence to prefill and decode.

    `request_id` is unique among the engine's unfinished requests. The output ends at `max_tokens`, at the engine's
    `max_model_len`, and, once it has `min_tokens`, with the end-of-sequence token (unless `ignore_eos`) or one of
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
    read_cache: bool = True
    """False: compute the whole prompt anew, whatever is cached. Its blocks are cached all the same."""


@dataclass(slots=True)
class Output:
    """One generated token: a value. (Not frozen: one is made for every token, and freezing triples its cost.)"""

    request_id: str
    token: int
    index: int
    """0 for the first token."""
    at: float
    """End of the step that made it, in the caller's seconds."""
    finish_reason: FinishReason | None
    """None unless this is the last token."""
    cached_tokens: int
    """Prompt tokens that were cached when the request was first scheduled (vLLM rule 17)."""


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Moments of one request, in the caller's seconds. None = it did not come to that. The spans are vLLM rule 18's."""

    arrival: float
    scheduled: float | None
    """Start of the first step that worked on it."""
    first_token: float | None
    last_token: float | None
    finished: float

    @property
    def queue(self) -> float | None:
        """Seconds spent waiting for the first step."""
        return _span(self.arrival, self.scheduled)

    @property
    def prefill(self) -> float | None:
        return _span(self.scheduled, self.first_token)

    @property
    def decode(self) -> float | None:
        return _span(self.first_token, self.last_token)

    @property
    def inference(self) -> float | None:
        return _span(self.scheduled, self.last_token)

    @property
    def ttft(self) -> float | None:
        return _span(self.arrival, self.first_token)

    @property
    def e2e(self) -> float:
        return self.finished - self.arrival


def _span(start: float | None, end: float | None) -> float | None:
    return end - start if start is not None and end is not None else None


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """The record of a request that ended, whatever the reason."""

    request_id: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, when it was first scheduled."""
    output_tokens: int
    max_tokens: int
    preemptions: int
    times: RequestTimes

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between two tokens (TPOT); None below two tokens."""
        decode = self.times.decode
        return decode / (self.output_tokens - 1) if decode is not None and self.output_tokens > 1 else None


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made. Read them at any time; nothing has to be drained."""

    prefix_cache_queries: int = 0
    """Prompt tokens looked up, at first admission."""
    prefix_cache_hits: int = 0
    """Of those, tokens found."""
    prefilled: int = 0
    """Requests that reached their first token."""
    prompt_tokens: int = 0
    """Of these."""
    cached_prompt_tokens: int = 0
    """Of those, tokens that came from the cache."""
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    """Sum of the steps' durations."""
    step_tokens: Counter[int] = field(default_factory=Counter)
    """How many steps computed so many tokens; has as many entries as different sizes occurred."""
    finished: Counter[FinishReason] = field(default_factory=Counter)
