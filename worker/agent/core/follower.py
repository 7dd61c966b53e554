"""The order of the engine's batches: which sequence number is next, what was missed, and when the blocks are dropped.

vLLM numbers its batches from 0 when its process starts. It keeps the last 10,000 for replay, and does not say when
older ones are gone. A `Follower` is driven like this:

    begin()                        a connection was made
    live(seq, payload)             a batch was published; False: ask for history, then offer the batch again, as the
                                   last resort if `next` has not changed
    history_begin() -> start       ask the engine for every batch from `start` on
    history(seq, payload)          ... for each batch of the answer
    history_end() -> bool          ... False: batches in the middle were lost on the way, ask again
    take() -> Update               what to publish

Invariant: the blocks are those of the batches applied since they were last empty, and no batch in between was left out.
Where one is left out (its history is lost, it cannot be read, the engine restarted) the blocks are dropped and a new
epoch begins: the view is then smaller than the engine's cache, never wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from kvcache.feed import Cleared, Event
from worker.agent.core.events import EventError, decode
from worker.agent.core.groups import EngineBlocks


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
    """Why an epoch began. Each but PROMPTS, TIERS, NAMES and GROUPS begins without blocks."""

    CONNECTED = "connected"  # the engine was found, or found again
    RESTARTED = "restarted"  # its sequence went backwards
    HISTORY_LOST = "history_lost"  # the engine no longer has batches that were missed
    UNREADABLE = "unreadable"  # a batch could not be read
    PROMPTS = "prompts"  # the agreement on the engine's prompts changed; the blocks stay
    NAMES = "names"  # requests may ask for the engine's model by other names than before; the blocks stay
    TIERS = "tiers"  # the time that loading a block from a slower tier takes has changed; the blocks stay
    GROUPS = "groups"  # the engine's events show groups or a block size that were not known; the blocks stay


@dataclass(frozen=True, slots=True)
class Update:
    """What there is to publish. With `reset`, a new epoch begins with the blocks as they are, which include
    `events`."""

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
        """The last batch that was received live. A lower one means a restart; it is not a copy of a replayed batch."""
        self._replay = ReplayState.IDLE
        self._events: list[Event] = []
        self._reset: Reset | None = None
        self._complete = False
        self.gaps = 0
        """How often a live batch was not the next one."""

    @property
    def complete(self) -> bool:
        """Whether the events of every block that the engine holds were applied."""
        return self._complete

    @property
    def next(self) -> int | None:
        """The number of the batch to apply next; None if any will do."""
        return self._next

    def begin(self) -> None:
        """A connection was made. The blocks known so far may be those of an engine that has restarted since."""
        self._forget(Reset.CONNECTED)

    def live(self, seq: int, payload: bytes, *, last_resort: bool = False) -> bool:
        """A batch was published. False, with nothing done, if the batches before it should be asked for first. With
        `last_resort` (they were asked for in vain) the missing batches are given up instead."""
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
        """The number of the first batch to ask for."""
        self._advance(ReplayEvent.BEGIN)
        return self._next or 0

    def history(self, seq: int, payload: bytes) -> None:
        """A batch of the answer to the request."""
        gap = self._next is not None and seq > self._next
        self._advance(ReplayEvent.GAP if gap else ReplayEvent.BATCH)
        if self._replay is ReplayState.TORN or (self._next is not None and seq < self._next):
            return
        if gap:  # before the first batch of the answer: the engine has forgotten what lies between
            self._lose()
        self._apply(seq, payload)

    def history_end(self) -> bool:
        """The answer has ended. False if it was torn."""
        ended = self._replay
        self._advance(ReplayEvent.END)
        if ended is ReplayState.ASKED and self._next == 0:
            self._complete = True  # vLLM remembers its last batches, so one that remembers none has published none
        return ended is not ReplayState.TORN

    def take(self) -> Update:
        """The changes since the last call."""
        update = Update(tuple(self._events), self._reset)
        self._events, self._reset = [], None
        return update

    def _advance(self, event: ReplayEvent) -> None:
        """The one place where the state of the replay changes. Raises `KeyError` for a batch that nobody asked for."""
        self._replay = REPLAY_TRANSITIONS[self._replay, event]

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
        """The batches before the next one are lost."""
        if self._reset is Reset.CONNECTED and not self.blocks.physical:
            self._complete = False  # nothing was known, so nothing is lost
        else:
            self._empty(Reset.HISTORY_LOST)

    def _forget(self, reset: Reset) -> None:
        """Start anew with batch 0 of an engine of which nothing is known."""
        self._empty(reset)
        self._next = 0 if self._can_replay else None
        self._live = -1

    def _empty(self, reset: Reset) -> None:
        self.blocks.clear()
        self._events = []
        self._reset = reset
        self._complete = False
