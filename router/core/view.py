"""The router's copy of one worker's cache, and the rules by which feed messages carry it forward."""

from __future__ import annotations

from kvcache.feed import Batch, Eviction, Removed, Snapshot, Stored, WorkerInfo
from router.core.errors import FeedGap, FeedRejected, StaleEpoch
from router.core.index import PrefixIndex


class View:
    """Where the copy stands: which life of the worker (`epoch`), how far in it (`seq`), how fresh.

    Invariant: while `synced`, the index holds exactly the blocks of the worker at `seq`, less the evictions pushed
    since (up to `evicted`). While not synced or refused, the index holds none of its blocks. A message that is
    rejected changes nothing, but a batch from a later life ends the view at once.
    """

    __slots__ = (
        "_index",
        "_timeout",
        "confirmed_at",
        "evicted",
        "info",
        "pulled_at",
        "refused",
        "seq",
        "slot",
        "synced",
        "unknown",
    )

    def __init__(self, index: PrefixIndex, timeout: float) -> None:
        """`timeout`: seconds after which a copy that nothing has confirmed is no longer relied on."""
        self._index = index
        self._timeout = timeout
        self.slot = index.open()
        self.info: WorkerInfo | None = None
        self.synced = False
        self.seq = 0
        self.evicted = 0
        self.confirmed_at: float | None = None
        """When the copy was last known to equal the worker's cache."""
        self.pulled_at: float | None = None
        """When the worker's own stream last spoke; pushes do not overrule a live stream."""
        self.refused: FeedRejected | None = None
        """Why the worker's blocks are not matched, though it states them."""
        self.unknown = 0
        """Removals of blocks that the copy did not hold: 0 unless the feed is out of order."""

    @property
    def epoch(self) -> int | None:
        return self.info.epoch if self.info is not None else None

    def usable(self, now: float) -> bool:
        """Whether prompts may be matched against the copy. One that nothing confirms is kept: it may be resumed."""
        return self.refused is None and not self._overdue(now)

    def why_unusable(self, now: float) -> str:
        """Why prompts are not matched against the worker's cache; empty when they are."""
        if self.refused is not None:
            return str(self.refused)
        if self.confirmed_at is None:
            return "no state of its cache has been taken yet"
        if self._overdue(now):
            return (
                f"nothing has confirmed the copy of its cache for more than {self._timeout:g} s: its cache feed, or "
                "the agent that serves that, is silent"
            )
        return ""

    def _overdue(self, now: float) -> bool:
        return self.confirmed_at is not None and now - self.confirmed_at > self._timeout

    def check_epoch(self, epoch: int) -> None:
        """Raises `StaleEpoch` for a message from an earlier life."""
        if self.info is not None and epoch < self.info.epoch:
            raise StaleEpoch(epoch, self.info.epoch)

    def meet(self, info: WorkerInfo) -> None:
        """The worker is in this life now; another life's blocks are gone with its process."""
        if self.epoch != info.epoch or self.refused is not None:
            self.lose()
        self.info = info
        self.refused = None

    def lose(self) -> None:
        """Nothing is known of the cache any more, until a snapshot comes."""
        self._index.clear(self.slot)
        self.synced = False
        self.seq = self.evicted = 0
        self.confirmed_at = None

    def refuse(self, why: FeedRejected) -> None:
        """From now on the worker is routed to by load alone."""
        self.lose()
        self.refused = why

    def close(self) -> None:
        """The worker left the fleet."""
        self._index.drop(self.slot)

    def install(self, snapshot: Snapshot, now: float) -> None:
        """Takes a snapshot of the current life in; one that is older than the view is left aside."""
        if self.synced and snapshot.seq < max(self.seq, self.evicted):
            return
        if not (self.synced and snapshot.seq == self.seq == max(self.seq, self.evicted)):
            self._index.replace(self.slot, (key for key, _ in snapshot.blocks))
            self.seq = self.evicted = snapshot.seq
            self.synced = True
        self.confirmed_at = now

    def apply(self, batch: Batch, now: float) -> None:
        """The next batch of the stream. A repeated one is left aside; raises `FeedGap` when one is missing."""
        if self.refused is not None:
            return
        if self.info is None or not self.synced:
            raise FeedGap("no snapshot of this worker has been taken yet")
        if batch.epoch > self.info.epoch:
            self.lose()
            raise FeedGap(f"the worker restarted: epoch {batch.epoch} follows {self.info.epoch}")
        if batch.seq > self.seq + bool(batch.events):
            raise FeedGap(f"batch {batch.seq} follows batch {self.seq}")
        if batch.seq < self.seq:
            return
        if batch.seq > self.seq:
            if self.evicted > self.seq:
                raise FeedGap(f"evictions up to {self.evicted} were pushed ahead of batch {batch.seq}")
            self._carry(batch)
            self.seq = self.evicted = batch.seq
        self.confirmed_at = now

    def _carry(self, batch: Batch) -> None:
        for event in batch.events:
            match event:
                case Stored(_, keys):
                    self._index.store(self.slot, keys)
                case Removed(keys):
                    self.unknown += self._index.remove(self.slot, keys)
                case _:
                    self._index.clear(self.slot)

    def evict(self, eviction: Eviction) -> None:
        """Pushed removals between two syncs. Blocks stored since the last sync are not known here, so a removal
        of one is no error. Raises `FeedGap` when there is no view to remove from."""
        if self.refused is not None:
            return
        if not self.synced or eviction.epoch != self.epoch:
            raise FeedGap("no view of this life of the worker to evict from: send a sync first")
        if eviction.seq > max(self.seq, self.evicted):
            self._index.remove(self.slot, eviction.keys)
            self.evicted = eviction.seq
