"""One emulated engine. Its caller supplies the time: real time in a worker, virtual time in a simulation."""

from __future__ import annotations

from kvcache.feed import HeldElsewhere, Load, Tier
from kvcache.keys import BlockKey
from kvcache.profiles import LatencyModel
from worker.emulator.engine.block_pool import BlockPool
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.events import CacheEvent
from worker.emulator.engine.leap import leap, plan
from worker.emulator.engine.offload import CpuTier
from worker.emulator.engine.request import (
    EngineRequest,
    EngineStats,
    FinishedRequest,
    FinishReason,
    Output,
    RequestRefusedError,
)
from worker.emulator.engine.scheduler import Scheduler, Step
from worker.emulator.engine.sequence import Sequence, SequenceEvent, SequenceState
from worker.emulator.engine.sliding import SlidingGroups

_FINISHED = SequenceState.FINISHED
"""Read once: an attribute of an enum is slow enough to show in a step of one sequence (3 % each)."""


class Engine:
    """A continuous-batching engine in logical time.

    The caller passes the time, in seconds of any monotonic origin. Steps have exact times: a step begins when the
    previous one has ended, as long as there is work, or when work arrives at an idle engine. A late or infrequent call
    changes nothing, because every method first completes the steps that have ended by its `now`.

    A request that is submitted at time t takes part in no step that begins before t. A step that begins at t itself
    begins with `advance(t)`, so that all requests submitted at t may share it.

    Call `advance` at `next_event()`, and take events and finished records as often: they are kept until then.
    """

    def __init__(self, config: EngineConfig, latency: LatencyModel) -> None:
        self.config = config
        self._latency = latency
        self.stats = EngineStats()
        self._cache = BlockPool(config.blocks)
        self._tier = CpuTier(config.cpu_blocks, config.cpu_block_seconds) if config.cpu_blocks else None
        self._sliding = SlidingGroups(config, self._cache) if config.sliding_groups else None
        self._scheduler = Scheduler(config, latency, self._cache, self.stats, self._tier, self._sliding)
        self._sequences: dict[str, Sequence] = {}
        self._step: Step | None = None
        self._ready_at = 0.0
        """When the next step may begin. Undefined while the engine is idle."""
        self._stalled = False
        """Whether every sequence waits for a load; `_ready_at` is the end of that load."""
        self._plan: list[float] = []
        """Of the step in progress (`leap.plan`); empty: none was made, or it holds no longer."""
        self._outputs: list[Output] = []
        self._finished: list[FinishedRequest] = []

    def change_latency(self, latency: LatencyModel) -> None:
        """From the next step on, steps take as long as `latency` says. Do not mix it with `next_change`."""
        self._latency = latency
        self._plan = []
        self._scheduler.change_latency(latency)

    def submit(self, request: EngineRequest, now: float) -> None:
        """Queue a request. Raises `RequestRefusedError`, and `kvcache.keys.TokenIdError` for an invalid token id."""
        self._run(now, begin_at_now=False)
        self._check(request)
        self._plan = []
        sequence = Sequence(request, self.config.block_size, self.config.max_model_len, now)
        if self._stalled:
            self._ready_at = now
        elif not self._sequences and self._step is None:
            self._ready_at = max(self._ready_at, now)
        self._sequences[request.request_id] = sequence
        self._scheduler.waiting.enqueue(sequence)

    def abort(self, request_id: str, now: float, reason: FinishReason = "abort") -> bool:
        """End a request at once and release its blocks. False if the engine has no such request (any more).

        The step in progress takes as long as before. The request gets no output from now on, and its record says
        `reason` ("stop" is for a caller that has found a stop string).
        """
        self._run(now, begin_at_now=False)
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._plan = []
        self._scheduler.remove(sequence)
        self._end(sequence, reason, now)
        return True

    def advance(self, now: float) -> list[Output]:
        """Complete every step that ends at or before `now` and begin the next. Returns the tokens generated, in
        order."""
        self._run(now, begin_at_now=True)
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_event(self) -> float | None:
        """When to call `advance` next: at the end of the step in progress or, if every sequence waits for a load, of
        that load. None while idle, which only `submit` ends."""
        if self._step is not None:
            return self._step.end
        return self._ready_at if self._has_work else None

    def next_changes(self) -> list[float]:
        """The ends of the next steps, at the last of which more happens than that running sequences get tokens: a block
        is taken or filled, a request ends. Empty while idle.

        For a caller who does not want every token on time: it may call `advance` at the last of these times instead of
        at `next_event()`. What it then gets are the tokens of the last step alone, and all else as with a call at each.
        The sources of all requests must have their tokens ready.
        """
        if self._step is None:
            due = self.next_event()
            return [] if due is None else [due]
        if not self._plan:
            self._plan = plan(self._step, self._scheduler, self._latency, self.config)
        return self._plan.copy()

    @property
    def _has_work(self) -> bool:
        """Whether there are requests, or loads of aborted ones."""
        return bool(self._sequences) or (self._tier is not None and self._tier.next_arrival is not None)

    @property
    def steps_ended(self) -> int:
        """How many steps have ended: all that have begun, but for the one in progress."""
        return self.stats.steps - (self._step is not None)

    def take_events(self) -> list[CacheEvent]:
        """The changes of the cache since the last call, in order; those of the CPU tier after those of the GPU."""
        events = self._cache.take_events()
        return events if self._tier is None else events + self._tier.take_events()

    def take_finished(self) -> list[FinishedRequest]:
        """Records of the requests that ended since the last call, in order."""
        finished, self._finished = self._finished, []
        return finished

    def blocks(self) -> list[tuple[BlockKey, BlockKey | None]]:
        """(key, parent key) of every cached block, parents first. A key that k blocks hold is listed k times."""
        return self._cache.blocks()

    def elsewhere(self) -> tuple[HeldElsewhere, ...]:
        """The blocks in the CPU tier, and those of the sliding groups."""
        if self._sliding is not None:
            held = self._sliding.held()
            return tuple(HeldElsewhere(Tier.GPU, group, tuple(keys)) for group, keys in held.items() if keys)
        if self._tier is None or not self._tier.cached:
            return ()
        return (HeldElsewhere(Tier.CPU, 0, tuple(self._tier.cached)),)

    @property
    def offloaded_blocks(self) -> int:
        """Blocks ever copied to the CPU tier."""
        return self._tier.stored if self._tier is not None else 0

    def load(self) -> Load:
        """The present load. O(running + waiting)."""
        return Load(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            prefill_tokens=self._scheduler.prefill_tokens(),
            free_blocks=self._cache.free,
            total_blocks=self._cache.total,
            prefilled=self.stats.prefilled,
            prefilled_tokens=self.stats.prompt_tokens - self.stats.cached_prompt_tokens,
        )

    @property
    def deferred(self) -> int:
        """Waiting requests that were passed over because `max_loras` other adapters ran."""
        return self._scheduler.waiting.deferred

    def adapters(self) -> list[str]:
        """The adapters that unfinished requests use, in the order of their first request: O(requests)."""
        scopes = (sequence.request.scope for sequence in self._sequences.values())
        return list(dict.fromkeys(scope.adapter for scope in scopes if scope.adapter))

    def reset_prefix_cache(self) -> bool:
        """Drop every cached block, of the CPU tier too. False, with nothing done, while a request holds blocks."""
        if not self._cache.clear():
            return False
        if self._tier is not None:
            self._tier.clear()
        return True

    def _check(self, request: EngineRequest) -> None:
        if request.request_id in self._sequences:
            raise RequestRefusedError(f"request id {request.request_id!r} is in use; choose another")
        if not request.prompt:
            raise RequestRefusedError("the prompt is empty; it needs at least one token")
        if len(request.prompt) >= self.config.max_model_len:
            raise RequestRefusedError(
                f"a prompt of {len(request.prompt)} tokens leaves no room for output within max_model_len "
                f"({self.config.max_model_len}); shorten it"
            )
        if request.max_tokens < 1:
            raise RequestRefusedError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if request.unread and (request.stop_token_ids or not request.ignore_eos):
            raise RequestRefusedError("a token that nobody reads ends no output: set ignore_eos, and no stop_token_ids")

    def _run(self, now: float, *, begin_at_now: bool) -> None:
        while True:
            step = self._step
            if step is not None:
                if len(self._plan) > 1:
                    self._step = step = leap(step, self._plan, now, self.stats)
                    self._ready_at = step.start
                if step.end > now:
                    return
                self._plan = []
                self._complete(step)
            start = self._ready_at
            if not self._has_work or start > now or (start == now and not begin_at_now):
                return
            self._step = step = self._scheduler.schedule(start)
            if step is None:
                arrival = self._tier.next_arrival if self._tier is not None else None
                self._stalled = arrival is not None
                if arrival is None:
                    return
                self._ready_at = arrival
                continue
            self._stalled = False
            stats = self.stats
            stats.steps += 1
            stats.busy_seconds += step.end - start
            stats.step_tokens[step.tokens] += 1

    def _complete(self, step: Step) -> None:
        """End a step: sample one token for each sequence whose known tokens are all computed."""
        self._step = None
        self._ready_at = at = step.end
        self._scheduler.step_ended()
        outputs = self._outputs
        generated = 0
        eos, finished = self.config.eos_token_id, _FINISHED
        ended = False
        for sequence in step.sampling:
            if sequence.state is finished:
                continue  # aborted during the step
            index = sequence.generated
            if sequence.unread and 0 < index < sequence.most_tokens - 1:
                sequence.tokens += 1
                sequence.generated = index + 1
                sequence.last_token = at
                generated += 1
                continue
            token = sequence.source.token(index)
            if token is None:
                continue
            sequence.append(token)
            sequence.last_token = at
            generated += 1
            if not index:
                sequence.first_token = at
                self.stats.prefilled += 1
                self.stats.prompt_tokens += sequence.prompt_tokens
                self.stats.cached_prompt_tokens += sequence.cached_tokens
                self.stats.loaded_prompt_tokens += sequence.loaded_tokens
            request = sequence.request
            reason: FinishReason | None = None
            if (
                (token == eos and not request.ignore_eos) or token in request.stop_token_ids
            ) and index + 1 >= request.min_tokens:
                reason = "stop"
            elif index + 1 >= sequence.most_tokens:
                reason = "length"
            outputs.append(Output(request.request_id, token, index, at, reason, sequence.cached_tokens))
            if reason is not None:
                self._scheduler.free(sequence)
                self._end(sequence, reason, at)
                ended = True
        self.stats.generation_tokens += generated
        if ended:
            self._scheduler.sweep()

    def _end(self, sequence: Sequence, reason: FinishReason, at: float) -> None:
        sequence.advance(SequenceEvent.FINISHED)
        self._scheduler.sequence_ended(sequence)
        del self._sequences[sequence.request.request_id]
        self.stats.finished[reason] += 1
        self._finished.append(sequence.finish(reason, at))
