"""The router's copy of one worker's cache, and the rules by which feed messages update it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum, StrEnum, auto

from kvcache.feed import AdaptersChanged, Batch, Cleared, Eviction, Removed, Snapshot, Stored, Tier, WorkerInfo
from router.core.errors import FeedGap, FeedRejected, Resync, StaleEpoch
from router.core.index import PrefixIndex
from router.core.standing import Changes
from router.core.windows import Group, shapes


class ViewState(Enum):
    """What the router's copy of a worker's cache is worth."""

    NONE = auto()
    """The worker has not said what it is."""
    SYNCING = auto()
    """There is no copy until the next snapshot: the worker is new or has restarted, or a refusal is over."""
    EXACT = auto()
    """The copy is the worker's cache at the last batch or snapshot."""
    REFUSED = auto()
    """The worker's blocks cannot be matched here: its messages update its load only."""


class ViewEvent(Enum):
    """What changes the state of a view."""

    IDENTIFIED = auto()
    """The worker said what it is for the first time."""
    RESTARTED = auto()
    """It is another incarnation than the one that the copy is of."""
    SNAPSHOT_INSTALLED = auto()
    REFUSED = auto()
    """The worker does not agree with this router, or another worker has its id."""
    RECONSIDERED = auto()
    """What it was refused for may be over."""


_TRANSITIONS: Mapping[tuple[ViewState, ViewEvent], ViewState] = {
    (ViewState.NONE, ViewEvent.IDENTIFIED): ViewState.SYNCING,
    (ViewState.SYNCING, ViewEvent.SNAPSHOT_INSTALLED): ViewState.EXACT,
    (ViewState.EXACT, ViewEvent.RESTARTED): ViewState.SYNCING,
    (ViewState.REFUSED, ViewEvent.RESTARTED): ViewState.SYNCING,
    (ViewState.SYNCING, ViewEvent.REFUSED): ViewState.REFUSED,
    (ViewState.EXACT, ViewEvent.REFUSED): ViewState.REFUSED,
    (ViewState.REFUSED, ViewEvent.RECONSIDERED): ViewState.SYNCING,
}


def transition(state: ViewState, event: ViewEvent) -> ViewState:
    """The state after `event`: the only way in which a `ViewState` changes. An event changes nothing in a state for
    which no transition is listed."""
    return _TRANSITIONS.get((state, event), state)


class Trust(StrEnum):
    """How far a view of a worker's cache can be relied on."""

    EXACT = "exact"
    """It is the worker's cache, up to the last message of its feed."""
    PARTIAL = "partial"
    """The worker may hold more: it has not stated what it holds, so that prompts are matched only against what this
    router sent there; its agent did not see all blocks being stored; or its feed removed blocks that the view did not
    have."""
    NONE = "none"
    """Prompts are not matched against the worker's cache: it gets requests by load."""


def _shape(info: WorkerInfo) -> tuple[object, ...]:
    return info.block_size, info.groups, frozenset(info.tier_seconds)


_REFUSED = ViewState.REFUSED  # each decision looks at it once per candidate


class View:
    """How far the copy follows the worker: which incarnation (`epoch`), up to which batch (`seq`), and how fresh.

    Invariant: while the state is EXACT, the index holds exactly the blocks of the worker at `seq`, less the evictions
    pushed since (up to `evicted`). In every other state the index holds none of its blocks. A message that is rejected
    changes nothing, except that a batch of a later incarnation ends the copy at once.
    """

    def __init__(self, index: PrefixIndex, timeout: float, block_size: int, changes: Changes) -> None:
        """`timeout`: seconds after which a copy that nothing has confirmed is no longer used; `block_size`: tokens of a
        block of the router."""
        self._index = index
        self._changes = changes
        self._timeout = timeout
        self._block_size = block_size
        self.slot = index.open()
        self.state = ViewState.NONE
        self.info: WorkerInfo | None = None
        """What the worker last said that it is; None exactly in state NONE."""
        self.refusal: FeedRejected | None = None
        """Why the worker's blocks are not matched; None except in state REFUSED."""
        self.seq = 0
        self.evicted = 0
        self.confirmed_at: float | None = None
        """When the copy was last known to equal the worker's cache."""
        self.pulled_at: float | None = None
        """When the worker's own stream last brought something; pushes do not overrule a live stream."""
        self.unknown = 0
        """Removals of blocks that the copy did not hold: 0 unless the feed is out of order."""

    @property
    def epoch(self) -> int | None:
        return self.info.epoch if self.info is not None else None

    @property
    def exact(self) -> bool:
        return self.state is ViewState.EXACT

    def usable(self, now: float) -> bool:
        """Whether prompts may be matched against the copy. A copy that nothing confirms is kept: it may be resumed."""
        if self.state is _REFUSED:
            return False
        return self.confirmed_at is None or now - self.confirmed_at <= self._timeout

    def trust(self, now: float) -> Trust:
        """How far the copy can be relied on now."""
        if not self.usable(now):
            return Trust.NONE
        whole = self.exact and not self.unknown and self.info is not None and self.info.complete
        return Trust.EXACT if whole else Trust.PARTIAL

    def why_unusable(self, now: float) -> str:
        """Why prompts are not matched against the worker's cache; empty when they are."""
        if self.refusal is not None:
            return str(self.refusal)
        if self.confirmed_at is None:
            return "no state of its cache has been taken yet"
        if not self.usable(now):
            return (
                f"nothing has confirmed the copy of its cache for more than {self._timeout:g} s: its cache feed, or "
                "the agent that serves that, is silent"
            )
        return ""

    def check_epoch(self, epoch: int) -> None:
        """Raises `StaleEpoch` for a message from an earlier incarnation."""
        if self.info is not None and epoch < self.info.epoch:
            raise StaleEpoch(epoch, self.info.epoch)

    def update(self, info: WorkerInfo) -> None:
        """The worker says what it is. The blocks of another incarnation are gone with its process, and a refusal is
        over until it is repeated."""
        if self.info is None:
            self._enter(ViewEvent.IDENTIFIED)
        elif self.info.epoch != info.epoch or _shape(self.info) != _shape(info):
            self._enter(ViewEvent.RESTARTED)
        if self.info is None or _shape(self.info) != _shape(info):
            self._index.set_shape(self.slot, *self._shape(info))
        self.info = info
        self.reconsider()

    def refuse(self, why: FeedRejected) -> None:
        """From now on the worker gets requests by load alone."""
        self._enter(ViewEvent.REFUSED)
        self.refusal = why

    def reconsider(self) -> None:
        """If the view is refused, it is so no longer; the next batch asks for a snapshot."""
        if self.state is ViewState.REFUSED:
            self._enter(ViewEvent.RECONSIDERED)

    def confirm(self, seq: int, now: float) -> None:
        """A heartbeat: the worker's cache is at batch `seq`."""
        if self.exact and self.seq == seq:
            self._confirm(now)

    def close(self) -> None:
        """The worker left the fleet."""
        self._index.drop(self.slot)

    def install(self, snapshot: Snapshot, now: float) -> None:
        """Take in a snapshot of the present incarnation; one that is older than the copy is ignored."""
        if self.exact and snapshot.seq < max(self.seq, self.evicted):
            return
        if not (self.exact and snapshot.seq == self.seq == max(self.seq, self.evicted)):
            elsewhere = [held for held in snapshot.elsewhere if self._reuses(held.tier)]
            self._index.replace(self.slot, (key for key, _ in snapshot.blocks), elsewhere)
            self.seq = self.evicted = snapshot.seq
            self.state = transition(self.state, ViewEvent.SNAPSHOT_INSTALLED)
        self._confirm(now)

    def apply(self, batch: Batch, now: float) -> None:
        """The next batch of the stream. A repeated one is ignored; raises `FeedGap` when one is missing."""
        if self.refusal is not None:
            self._note_adapters(batch)
            return
        if self.info is None or not self.exact:
            raise FeedGap("no snapshot of this worker has been taken yet")
        if batch.epoch > self.info.epoch:
            self._enter(ViewEvent.RESTARTED)
            restarted = f"the worker restarted: epoch {batch.epoch} follows {self.info.epoch}"
            raise FeedGap(restarted, Resync.RESTARTED)
        if batch.seq > self.seq + bool(batch.events):
            raise FeedGap(f"batch {batch.seq} follows batch {self.seq}")
        if batch.seq < self.seq:
            return
        if batch.seq > self.seq:
            if self.evicted > self.seq:
                raise FeedGap(f"evictions up to {self.evicted} were pushed ahead of batch {batch.seq}")
            self._apply_events(batch)
            self.seq = self.evicted = batch.seq
        self._confirm(now)

    def evict(self, eviction: Eviction) -> None:
        """Pushed removals between two syncs. Blocks stored since the last sync are not in the copy, so the removal of
        one is no error. Raises `FeedGap` when there is no copy to remove from."""
        if self.refusal is not None:
            return
        if not self.exact or eviction.epoch != self.epoch:
            raise FeedGap("no view of this incarnation of the worker to evict from: send a sync first")
        if eviction.seq > max(self.seq, self.evicted):
            self._index.remove(self.slot, eviction.keys)
            self.evicted = eviction.seq

    def _apply_events(self, batch: Batch) -> None:
        for event in batch.events:
            match event:
                case Stored(_, keys, tier, group):
                    if self._reuses(tier):
                        self._index.store(self.slot, keys, tier, group)
                case Removed(keys, tier, group):
                    if self._reuses(tier):
                        self.unknown += self._index.remove(self.slot, keys, tier, group)
                case Cleared():
                    self._index.clear(self.slot)
                    if self.info is not None and not self.info.complete:
                        self.info = replace(self.info, complete=True)  # there is nothing left that was not seen
                case AdaptersChanged():
                    self._note_adapters(batch)

    def _note_adapters(self, batch: Batch) -> None:
        """Of a worker whose blocks are not matched, too, it matters what it serves."""
        for event in batch.events:
            if isinstance(event, AdaptersChanged) and self.info is not None:
                self.info = replace(self.info, adapters=event.names, missing_adapters=event.missing)

    def load_seconds(self, loaded: Mapping[Tier, int]) -> float:
        """Seconds that loading these blocks (of the router) from the slower tiers takes."""
        if self.info is None:
            return 0.0
        seconds = self.info.tier_seconds
        total = sum(blocks * seconds.get(tier, 0.0) for tier, blocks in loaded.items())
        return total / self._index.stride(self.slot)

    def _reuses(self, tier: Tier) -> bool:
        """Whether the worker reuses blocks of this tier. The copy leaves the others out."""
        return tier is Tier.GPU or (self.info is not None and tier in self.info.tier_seconds)

    def _shape(self, info: WorkerInfo) -> tuple[int, tuple[Group, ...]]:
        """The worker's stride and groups, as the index needs them. Of a block size that is no multiple of the router's
        it does not matter, because it is refused (`FleetConfig.mismatch`)."""
        size = self._block_size
        if any(group.block_size % size or not group.block_size for group in info.groups):
            return 1, ()
        return max(1, info.block_size // size), shapes(info.groups, size)

    def _confirm(self, now: float) -> None:
        """The copy equals the worker's cache."""
        if not self.usable(now):
            self._changes.views += 1
        self.confirmed_at = now

    def _enter(self, event: ViewEvent) -> None:
        """Move to the state that follows, which is one without a copy."""
        self._changes.views += 1
        self.state = transition(self.state, event)
        self.refusal = None
        self._index.clear(self.slot)
        self.seq = self.evicted = 0
        self.confirmed_at = None
