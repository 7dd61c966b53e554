"""The CPU tier of an engine: copies of blocks in the host's memory, as vLLM's offloading connector keeps them.

Checked against vLLM 0.32, `vllm/v1/kv_offload/cpu/` and `.../kv_connector/v1/offloading/scheduler.py`, with its
defaults (chunks of one block, LRU, prompts only). Beside its `CPUOffloadingManager`, 120,000 random requests led to the
same contents, loads and evictions.

- A block of a prompt is copied to the CPU when it has been computed, not when the GPU evicts it. A request offers every
  block of its prompt, also those that it hit on the GPU; what the tier holds already is not copied again.
- If the blocks of an offer do not fit, even after the eviction of all that no load needs, none of them is stored, and
  they are offered again with the request's next step.
- A request's blocks become the most recent ones when it ends, the head of the prompt last: the tail is evicted before
  the head. But a request that loads blocks leaves the age of those that it hit on the GPU as it is, so a block can be
  evicted before its children: unlike the GPU's cache, the tier is not prefix-closed.
- Loads run one after the other, beside the engine's steps.

Not modelled: the time that stores take (they share no resource with loads), chunks of several blocks, other policies
than LRU, further tiers below the CPU, and failed transfers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass
from itertools import islice

from kvcache.feed import Tier
from kvcache.keys import BlockKey
from worker.emulator.engine.events import BlocksRemoved, BlocksStored, CacheEvent
from worker.emulator.engine.sequence import Sequence as EngineSequence
from worker.emulator.engine.tokens import SequenceTokens


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """The blocks from index `first` on that one sequence loads, and when the last of them arrives."""

    sequence: EngineSequence
    first: int
    keys: Sequence[BlockKey]
    end: float


class CpuTier:
    """`capacity` blocks in the least-recently-used order. Not thread-safe; called by the scheduler alone."""

    def __init__(self, capacity: int, block_seconds: float) -> None:
        """`block_seconds`: how long loading one block takes."""
        self.capacity = capacity
        self.stored = 0
        """Blocks ever copied to the tier."""
        self._block_seconds = block_seconds
        self._blocks: OrderedDict[BlockKey, None] = OrderedDict()
        self._pinned: Counter[BlockKey] = Counter()
        """Blocks that are being loaded, with the number of their loads."""
        self._loads: deque[BlockLoad] = deque()
        """In the order of their ends."""
        self._events: list[CacheEvent] = []

    @property
    def cached(self) -> KeysView[BlockKey]:
        """The keys that can be loaded: a live view."""
        return self._blocks.keys()

    @property
    def next_arrival(self) -> float | None:
        """When the next load ends; None: there is none."""
        return self._loads[0].end if self._loads else None

    def hits(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """The longest run of `keys`, from the first on, that can be loaded."""
        found: list[BlockKey] = []
        for key in keys:
            if key not in self._blocks:
                break
            found.append(key)
        return found

    def loading(self, keys: Iterable[BlockKey]) -> bool:
        """Whether one of these blocks is being loaded for another request."""
        pinned = self._pinned
        return bool(pinned) and any(key in pinned for key in keys)

    def load(self, sequence: EngineSequence, first: int, keys: Sequence[BlockKey], now: float) -> float:
        """Begin to load blocks, once the earlier loads have ended. Returns the seconds that the transfer takes."""
        begin = max(now, self._loads[-1].end) if self._loads else now
        seconds = len(keys) * self._block_seconds
        self._loads.append(BlockLoad(sequence, first, keys, begin + seconds))
        self._pinned.update(keys)
        return seconds

    def arrived(self, now: float) -> list[BlockLoad]:
        """The loads that have ended since the last call."""
        ended: list[BlockLoad] = []
        while self._loads and self._loads[0].end <= now:
            load = self._loads.popleft()
            ended.append(load)
            for key in load.keys:
                self._pinned[key] -= 1
                if not self._pinned[key]:
                    del self._pinned[key]
        return ended

    def offer(self, content: SequenceTokens, first: int, end: int) -> bool:
        """Store those blocks from index `first` up to `end` of a sequence that the tier does not hold. False: there is
        no room for them, and none was stored."""
        keys = content.keys(end)
        blocks = self._blocks
        new = [at for at in range(first, end) if keys[at] not in blocks]
        short = len(new) - (self.capacity - len(blocks))
        if short > 0:
            offered, pinned = frozenset(keys[first:end]), self._pinned
            evicted = tuple(islice((key for key in blocks if key not in pinned and key not in offered), short))
            if len(evicted) < short:
                return False
            for key in evicted:
                del blocks[key]
            self._events.append(BlocksRemoved(evicted, Tier.CPU))
        begin = 0
        for at, index in enumerate(new):
            blocks[keys[index]] = None
            if at + 1 == len(new) or new[at + 1] != index + 1:  # the end of a run
                run, begin = new[begin], at + 1
                parent = keys[run - 1] if run else None
                self._events.append(BlocksStored(tuple(keys[run : index + 1]), parent, content, run, Tier.CPU))
        self.stored += len(new)
        return True

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """A request that used these blocks, given in the order of its prompt, has ended."""
        blocks = self._blocks
        for key in reversed(keys):
            if key in blocks:
                blocks.move_to_end(key)

    def clear(self) -> None:
        """Drop every block. There must be no loads."""
        self._blocks.clear()

    def take_events(self) -> list[CacheEvent]:
        """The changes since the last call, in order."""
        events, self._events = self._events, []
        return events
