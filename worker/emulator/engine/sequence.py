"""One request inside the engine: its state, how far it is computed, and its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum, auto

from kvcache.keys import BYTES_PER_TOKEN, pack_tokens
from worker.emulator.engine.request import EngineRequest, FinishedRequest, FinishReason, RequestTimes
from worker.emulator.engine.tokens import SequenceTokens, ready


class SequenceState(StrEnum):
    """Where a request stands in the engine. vLLM's RUNNING is two states here, PREFILLING and DECODING. (A `StrEnum`,
    because its members hash in C.)"""

    WAITING = auto()
    """In the queue: not admitted yet, or preempted. It holds no blocks."""
    LOADING = auto()
    """Blocks of its prompt are being loaded from the CPU (vLLM's WAITING_FOR_REMOTE_KVS). It holds blocks for them."""
    LOADED = auto()
    """The load has ended, and it waits to be admitted."""
    PREFILLING = auto()
    """Admitted; some of its known tokens have no KV yet."""
    DECODING = auto()
    """All known tokens are computed, or are being computed by the step in progress."""
    FINISHED = auto()


class SequenceEvent(StrEnum):
    """What changes the state of a request."""

    LOAD_BEGAN = auto()
    LOAD_ENDED = auto()
    ADMITTED = auto()
    PREFILLED = auto()
    """The step has begun that computes the last of its known tokens."""
    PREEMPTED = auto()
    FINISHED = auto()
    """Its output ended, or it was aborted."""


SEQUENCE_TRANSITIONS: Mapping[tuple[SequenceState, SequenceEvent], SequenceState] = {
    (SequenceState.WAITING, SequenceEvent.ADMITTED): SequenceState.PREFILLING,
    (SequenceState.WAITING, SequenceEvent.LOAD_BEGAN): SequenceState.LOADING,
    (SequenceState.WAITING, SequenceEvent.FINISHED): SequenceState.FINISHED,
    (SequenceState.LOADING, SequenceEvent.LOAD_ENDED): SequenceState.LOADED,
    (SequenceState.LOADING, SequenceEvent.FINISHED): SequenceState.FINISHED,
    (SequenceState.LOADED, SequenceEvent.ADMITTED): SequenceState.PREFILLING,
    (SequenceState.LOADED, SequenceEvent.FINISHED): SequenceState.FINISHED,
    (SequenceState.PREFILLING, SequenceEvent.PREFILLED): SequenceState.DECODING,
    (SequenceState.PREFILLING, SequenceEvent.PREEMPTED): SequenceState.WAITING,
    (SequenceState.PREFILLING, SequenceEvent.FINISHED): SequenceState.FINISHED,
    (SequenceState.DECODING, SequenceEvent.PREEMPTED): SequenceState.WAITING,
    (SequenceState.DECODING, SequenceEvent.FINISHED): SequenceState.FINISHED,
}


class Sequence:
    """State of one unfinished request. Only the scheduler and the engine see and change it.

    Tokens are packed once, at submission. The keys of its blocks survive preemption.
    """

    __slots__ = (
        "_packed", "admission_cost", "arrival", "block_cost", "blocks", "cached_tokens", "computed", "content",
        "first_token", "generated", "known_hits", "last_token", "loaded_tokens", "most_tokens", "offered",
        "preemptions", "prompt_tokens", "request", "scheduled", "source", "state", "stored", "tokens", "unread",
        "used_from", "used_to",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, block_size: int, max_model_len: int, arrival: float) -> None:
        self.request = request
        self.source = request.source
        self.unread = request.unread
        self.arrival = arrival
        self.prompt_tokens = len(request.prompt)
        self.tokens = self.prompt_tokens
        """Prompt and generated tokens."""
        self.most_tokens = min(request.max_tokens, max_model_len - self.prompt_tokens)
        """Generated tokens after which it ends in any case."""
        self.generated = 0
        self.computed = 0
        """Leading tokens that have KV, including those that the step in progress computes."""
        self.blocks: list[int] = []
        self.state = SequenceState.WAITING
        self.known_hits = 0
        """While waiting: leading blocks that were cached at the last load report."""
        self.admission_cost = 0.0
        """Seconds that the next chunk takes beside those of its blocks. Charged once for each admission."""
        self.block_cost = 0.0
        """Seconds for each block of the present prefill; 0 if the whole prompt is cached."""
        self.cached_tokens = 0
        self.loaded_tokens = 0
        """Those of the cached tokens that were loaded from the CPU."""
        self.stored = 0
        """Leading blocks that are on the GPU since a load ended, and are not stored there again."""
        self.offered = 0
        """Leading blocks that the CPU tier was offered, or has given."""
        self.used_from = self.used_to = 0
        """The range of its blocks that it used in the CPU tier: those that it loaded, and those that it offered,
        whether or not there was room for them."""
        self.preemptions = 0
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.content = SequenceTokens(
            request.prompt,
            block_size,
            request.scope,
            request.images,
            request.image_tokens,
            request.keys,
            request.source if request.unread else None,
        )
        self._packed = self.content.packed

    def advance(self, event: SequenceEvent) -> None:
        """The one place where the state changes. Raises `KeyError` for an event that the state does not allow."""
        self.state = SEQUENCE_TRANSITIONS[self.state, event]

    def append(self, token: int) -> None:
        """Append a generated token."""
        if not self.unread:
            self._packed += token.to_bytes(BYTES_PER_TOKEN, "little")
        self.tokens += 1
        self.generated += 1

    def append_many(self, count: int) -> None:
        """Append the next `count` generated tokens, which are ready."""
        if not self.unread:
            self._packed += pack_tokens(ready(self.source, self.generated, self.generated + count))
        self.tokens += count
        self.generated += count

    def finish(self, reason: FinishReason, at: float) -> FinishedRequest:
        """The record of the finished request."""
        return FinishedRequest(
            request_id=self.request.request_id,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.generated,
            max_tokens=self.request.max_tokens,
            preemptions=self.preemptions,
            times=RequestTimes(self.arrival, self.scheduled, self.first_token, self.last_token, at),
        )
