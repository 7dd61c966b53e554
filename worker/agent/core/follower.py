"""The engine's batches in their order: which sequence number comes next, what was missed, when all is to be forgotten.

vLLM numbers its batches from 0 when its process starts, and keeps the last 10,000 for replay without saying when older
ones are gone. Whoever drives a `Follower` does so like this:

    begin()                        a connection was made
    live(seq, payload)             a batch was published; False: ask for history first, then offer it again, as the
                                   last resort if `next` is still the same
    history_begin() -> start       ask the engine for every batch from `start` on
    history(seq, payload)          ... hand over each one that it answers
    history_end() -> bool          ... False: some in the middle were lost on the way, ask again
    take() -> Update               publish this

Invariant: the blocks are those of the batches applied since they were last empty, with no batch left out in between.
Where one is left out (history lost, a batch that cannot be read, another life of the engine) they are emptied and a new
epoch begins: the view is then smaller than the truth, never wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from kvcache.feed import Cleared, Event
from worker.agent.core.blocks import EngineBlocks
from worker.agent.core.events import EventError, decode


class ReplayState(Enum):
    """How far the answer to a request for missed batches has come."""

    IDLE = auto()
    """Nothing was asked for."""
    ASKED = auto()
    """Nothing has been answered yet. The first batch may be later than the one asked for, if that is forgotten."""
    ANSWERING = auto()
    TORN = auto()
    """A batch in the middle was lost on the way. What follows is not applied; the engine has to be asked again."""


class ReplayEvent(Enum):
    """What changes how far a replay is."""

    BEGIN = auto()
    BATCH = auto()
    """A batch that is the next one, or that was applied before."""
    GAP = auto()
    """A batch later than the next one."""
    END = auto()


REPLAY_TRANSITIONS: Mapping[tuple[ReplayState, ReplayEvent], ReplayState] = {
    **{(state, ReplayEvent.BEGIN): ReplayState.ASKED for state in ReplayState},
    **{(state, ReplayEvent.END): ReplayState.IDLE for state in ReplayState},
    (ReplayState.ASKED, ReplayEvent.BATCH): ReplayState.ANSWERING,
    (ReplayState.ASKED, ReplayEvent.GAP): ReplayState.ANSWERING,
    (ReplayState.ANSWERING, ReplayEvent.BATCH): ReplayState.ANSWERING,
    (ReplayState.ANSWERING, ReplayEvent.GAP): ReplayState.TORN,
    (ReplayState.TORN, ReplayEvent.BATCH): ReplayState.TORN,
    (ReplayState.TORN, ReplayEvent.GAP): ReplayState.TORN,
}


class Reset(StrEnum):
    """Why an epoch began: but for the last one, with nothing known of the one before."""

    CONNECTED = "connected"  # the engine was found, or found again
    RESTARTED = "restarted"  # its sequence went backwards
    HISTORY_LOST = "history_lost"  # batches were missed that cannot be had any more
    UNREADABLE = "unreadable"  # a batch could not be read
    PROMPTS = "prompts"  # the blocks stay: what is known of the engine's prompts is another than before


@dataclass(frozen=True, slots=True)
class Update:
    """What there is to publish. With `reset`, a new epoch begins with the blocks as they are, `events` included."""

    events: tuple[Event, ...]
    reset: Reset | None


class Follower:
    """Applies batches to `blocks`."""

    __slots__ = (
        "_can_replay", "_complete", "_events", "_live", "_next", "_replay", "_reset", "blocks", "gaps",
    )  # fmt: skip

    def __init__(self, blocks: EngineBlocks, *, can_replay: bool) -> None:
        self.blocks = blocks
        self._can_replay = can_replay
        self._next: int | None = None
        self._live = -1
        """The last batch that was published to us: lower ones are a restart, not copies of what was replayed."""
        self._replay = ReplayState.IDLE
        self._events: list[Event] = []
        self._reset: Reset | None = None
        self._complete = False
        self.gaps = 0
        """Times a batch came that was not the next one."""

    @property
    def complete(self) -> bool:
        """Whether every block that the engine holds was seen being stored."""
        return self._complete

    @property
    def next(self) -> int | None:
        """The batch to apply next; None: whichever comes first."""
        return self._next

    def begin(self) -> None:
        """A connection was made. What was known may be of an earlier life of the engine."""
        self._forget(Reset.CONNECTED)

    def live(self, seq: int, payload: bytes, *, last_resort: bool = False) -> bool:
        """A published batch. False, and nothing is done, when batches before it should be asked for; with
        `last_resort` (they were, in vain) what was missed is given up instead."""
        if seq <= self._live:
            self._forget(Reset.RESTARTED)
        if self._next is not None:
            if seq < self._next:
                self._live = seq
                return True  # it was replayed already
            if seq > self._next:
                if not last_resort:
                    self.gaps += self._next > 0
                    if self._can_replay:
                        return False
                self._lose()
        self._live = seq
        self._apply(seq, payload)
        return True

    def history_begin(self) -> int:
        """The first batch to ask for."""
        self._replaying(ReplayEvent.BEGIN)
        return self._next or 0

    def history(self, seq: int, payload: bytes) -> None:
        """A replayed batch."""
        gap = self._next is not None and seq > self._next
        self._replaying(ReplayEvent.GAP if gap else ReplayEvent.BATCH)
        if self._replay is ReplayState.TORN or (self._next is not None and seq < self._next):
            return
        if gap:  # before the first batch of the answer: the engine has forgotten what lies between
            self._lose()
        self._apply(seq, payload)

    def history_end(self) -> bool:
        """Whether the answer had no hole."""
        ended = self._replay
        self._replaying(ReplayEvent.END)
        if ended is ReplayState.ASKED and self._next == 0:
            self._complete = True  # vLLM remembers its last batches, so one that remembers none has published none
        return ended is not ReplayState.TORN

    def take(self) -> Update:
        """What has changed since the last call."""
        update = Update(tuple(self._events), self._reset)
        self._events, self._reset = [], None
        return update

    def _replaying(self, happened: ReplayEvent) -> None:
        """The one place where the state of the replay changes. Raises `KeyError` for a batch that nobody asked for."""
        self._replay = REPLAY_TRANSITIONS[self._replay, happened]

    def _apply(self, seq: int, payload: bytes) -> None:
        self._complete = self._complete or seq == 0
        self._next = seq + 1
        try:
            events = self.blocks.apply(decode(payload))
        except EventError:
            self._empty(Reset.UNREADABLE)
            return
        self._complete = self._complete or any(isinstance(event, Cleared) for event in events)
        self._events += events

    def _lose(self) -> None:
        """Batches before the next one are gone."""
        if self._reset is Reset.CONNECTED and not self.blocks.physical:
            self._complete = False  # nothing was known, so nothing is lost
        else:
            self._empty(Reset.HISTORY_LOST)

    def _forget(self, reset: Reset) -> None:
        """Start with batch 0 of a life that nothing is known of."""
        self._empty(reset)
        self._next = 0 if self._can_replay else None
        self._live = -1

    def _empty(self, reset: Reset) -> None:
        self.blocks.clear()
        self._events = []
        self._reset = reset
        self._complete = False
