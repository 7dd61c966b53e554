"""Steps that only decode, taken many at a time.

While no request comes, ends or fills a block, each step gives every running sequence one more token, and nothing else
changes: no event, no load. Who does not want the tokens themselves need not be there when these steps end. A plan is
the row of such steps from the present one on. Their ends are computed as the scheduler computes them, one after the
other, so that they are the same to the last bit.
"""

from __future__ import annotations

from bisect import bisect_right

from kvcache.profiles import LatencyModel
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.request import EngineStats
from worker.emulator.engine.scheduler import Scheduler, Step
from worker.emulator.engine.sequence import SequenceState

_DECODING = SequenceState.DECODING


def plan(step: Step, scheduler: Scheduler, latency: LatencyModel, config: EngineConfig) -> list[float]:
    """The ends of the steps from `step` on at which nothing happens but that each sequence gets a token, and the end of
    the step after them; just that of `step` if there are none. O(sequences + steps)."""
    ends = [step.end]
    count = _plain_steps(step, scheduler, config)
    if count:
        sequences = len(step.sampling)
        context = sum(sequence.computed for sequence in step.sampling)
        end = step.end
        for _ in range(count):
            context += sequences
            end = end + latency.decode_step(sequences, context)
            ends.append(end)
    return ends


def _plain_steps(step: Step, scheduler: Scheduler, config: EngineConfig) -> int:
    """How many steps, from `step` on, end plainly and are followed by one that takes and fills no block."""
    running, size = scheduler.running, config.block_size
    if len(scheduler.waiting) or not running or len(step.sampling) != len(running) or step.tokens != len(running):
        return 0
    if config.cpu_blocks or config.sliding_groups:
        return 0
    count = size
    for sequence in running:
        request, filled = sequence.request, sequence.computed % size
        if sequence.state is not _DECODING or not sequence.generated or not filled:
            return 0
        if not request.ignore_eos or request.stop_token_ids:
            return 0
        left = sequence.most_tokens - sequence.generated - 1
        count = min(count, size - 1 - filled, left)
    return count


def leap(step: Step, ends: list[float], now: float, stats: EngineStats) -> Step:
    """Take the planned steps that have ended by `now`, the last of the plan aside. Returns the step in progress then;
    the plan begins with its end."""
    count = bisect_right(ends, now, hi=len(ends) - 1)
    if not count:
        return step
    for sequence in step.sampling:
        sequence.append_many(count)
        sequence.computed += count
        sequence.last_token = ends[count - 1]
    sequences = len(step.sampling)
    stats.steps += count
    stats.step_tokens[sequences] += count
    stats.generation_tokens += count * sequences
    for at in range(count):
        stats.busy_seconds += ends[at + 1] - ends[at]
    started, ended = ends[count - 1], ends[count]
    del ends[:count]
    return Step(started, ended, step.sampling, sequences)
