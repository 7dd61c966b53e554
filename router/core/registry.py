"""Who the workers are: joining, leaving, identity and life; and the feed messages they are changed by."""

from __future__ import annotations

from collections.abc import Iterator

from kvcache.feed import Batch, Eviction, Heartbeat, Load, Snapshot, WorkerInfo
from router.core.config import FleetConfig
from router.core.errors import DuplicateWorker, FeedRejected, RejectReason, UnknownWorker
from router.core.health import Health
from router.core.heat import Heat
from router.core.index import PrefixIndex
from router.core.latency_correction import FleetPace
from router.core.view import View
from router.core.work import Residence, Work
from router.core.worker import Member
from router.core.worker_state import State

MAX_URL = 2048


class Registry:
    """Members by URL, and which of them owns each worker id.

    Invariant: `_owners[id] is m` exactly for the members whose view's info states that id and is not refused as a
    duplicate. A worker id has one owner: the latest life that is reachable.
    """

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self.index = PrefixIndex()
        self._pace = FleetPace()
        self.residence = Residence(config.expected_output_tokens, config.latency.decode)
        self._members: dict[str, Member] = {}
        self._owners: dict[str, Member] = {}
        self._expired_at: float | None = None
        self.health = Health(config, self._members.values())

    # --- who there is -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def find(self, url: str) -> Member:
        """The member at this URL. Raises `UnknownWorker`."""
        member = self._members.get(url)
        if member is None:
            raise UnknownWorker(
                f"no worker is registered at {url!r:.200}: add it to discovery or send a heartbeat first"
            )
        return member

    def get(self, url: str) -> Member | None:
        """The member at this URL, if there is one."""
        return self._members.get(url)

    def add(self, url: str, feed_vouches: bool) -> None:
        """Discovery names a worker, one that is known by its heartbeats perhaps."""
        member = self._members.get(url)
        if member is None:
            member = self._join(url)
        member.discovered = True
        member.feed_vouches = feed_vouches

    def remove(self, url: str) -> None:
        """Forgets a worker altogether."""
        member = self._members.pop(url, None)
        if member is not None:
            self._disown(member)
            member.view.close()
            self.health.fleet_shrank()

    def _join(self, url: str) -> Member:
        config = self._config
        work = Work(config, self._pace, self.residence)
        member = Member(url, View(self.index, config.view_timeout), work, Heat(config.heat_half_life))
        self._members[url] = member
        return member

    # --- life -------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[str]:
        """Members that were silent for too long; see `Fleet.expire`."""
        timeout = self._config.liveness_timeout
        late = self._expired_at is not None and now - self._expired_at > timeout / 2
        self._expired_at = now
        left, forgotten = [], []
        for member in self._members.values():
            member.work.expire_report(now)
            silent = now - member.heard_at
            if not member.reachable:
                if not member.discovered and silent > self._config.forget_after:
                    forgotten.append(member.url)
            elif late and not member.doubted:
                member.doubted = True
                member.heard_at = now
            elif silent > timeout:
                member.silence(f"it has been silent for more than {timeout:g} s")
                left.append(member.url)
        if left:
            self.health.fleet_shrank()
        for url in forgotten:
            self.remove(url)
        return left

    def silence(self, url: str, now: float) -> float:
        """See `Fleet.silence`."""
        member = self._members.get(url)
        return now - member.heard_at if member is not None and member.state is State.UNREACHABLE else 0.0

    # --- identity ---------------------------------------------------------------------------------------

    def _conflict(self, member: Member, info: WorkerInfo) -> DuplicateWorker | None:
        """Why `member` cannot own the worker id: another one's claim is as good."""
        owner = self._owners.get(info.worker_id)
        if owner is None or owner is member or not owner.reachable:
            return None
        epoch = owner.view.epoch
        if epoch is None or epoch < info.epoch or (epoch == info.epoch and not owner.discovered):
            return None  # in the same life it is one process, known by its heartbeats before discovery named it
        return DuplicateWorker(info.worker_id, owner.url)

    def _own(self, member: Member, info: WorkerInfo) -> None:
        """Makes `member` the owner of the worker id, in place of whoever had it."""
        owner = self._owners.pop(info.worker_id, None)
        if owner is not None and owner is not member:
            if owner.discovered:
                owner.view.refuse(DuplicateWorker(info.worker_id, member.url))
            else:
                self.remove(owner.url)
        if member.worker_id != info.worker_id:
            self._disown(member)
        self._owners[info.worker_id] = member

    def _disown(self, member: Member) -> None:
        """Gives up the member's worker id; whoever was refused for claiming it may try again."""
        if self._owners.get(member.worker_id) is not member:
            return
        del self._owners[member.worker_id]
        for other in self._members.values():
            refused = other.view.refused
            if other is not member and refused is not None and refused.reason is RejectReason.DUPLICATE_WORKER:
                other.view.refused = None  # not synced, so its next batch asks for a snapshot

    def _owner(self, worker_id: str) -> Member:
        member = self._owners.get(worker_id)
        if member is None:
            raise UnknownWorker(f"no worker calls itself {worker_id!r:.200}: send a heartbeat first")
        return member

    def reconsider(self, config: FleetConfig) -> None:
        """The router's own side of what must agree has changed: whoever was refused for it may try again."""
        self._config = config
        for member in self._members.values():
            if member.view.refused is not None and member.view.refused.reason is not RejectReason.DUPLICATE_WORKER:
                member.view.refused = None  # not synced, so its next batch asks for a snapshot

    # --- the feed ---------------------------------------------------------------------------------------

    def apply_snapshot(self, url: str, snapshot: Snapshot, now: float) -> None:
        """See `Fleet.apply_snapshot`."""
        member = self.find(url)
        view, info = member.view, snapshot.info
        if member.reachable:
            view.check_epoch(info.epoch)  # after a lost contact any life may be the current one: clocks can step back
        member.fed(now)
        conflict = member.unmask(info) or self._conflict(member, info)
        if conflict is None:
            self._own(member, info)
        else:
            self._disown(member)
        self._meet(member, info, snapshot.load, now)
        refusal = conflict or self._config.mismatch(info)
        if refusal is not None:
            view.refuse(refusal)
            raise refusal
        view.install(snapshot, now)
        view.pulled_at = now

    def apply_batch(self, url: str, batch: Batch, now: float) -> None:
        """See `Fleet.apply_batch`."""
        member = self.find(url)
        member.view.check_epoch(batch.epoch)
        member.fed(now)
        member.view.apply(batch, now)
        member.view.pulled_at = now
        member.work.report(batch.load, now)

    def apply_heartbeat(self, heartbeat: Heartbeat, now: float) -> bool:
        """See `Fleet.apply_heartbeat`."""
        info, url = heartbeat.info, heartbeat.url.rstrip("/")
        refusal = self._config.mismatch(info)
        if refusal is not None and refusal.reason is not RejectReason.NO_TOKENIZER:
            raise refusal
        if not url.startswith(("http://", "https://")) or len(url) > MAX_URL:
            raise FeedRejected(RejectReason.MALFORMED, f"url must look like http://host:port, not {url!r:.200}")
        owner = self._owners.get(info.worker_id)
        member = self._members.get(url)
        if owner is not None:
            owner.view.check_epoch(info.epoch)
            if owner.view.epoch == info.epoch:
                member = owner  # one process; discovery may know it by another name of the same address
        if member is not None:
            member.view.check_epoch(info.epoch)
        if member is None:
            member = self._join(url)
        self._own(member, info)
        member.heard(now)
        self._meet(member, info, heartbeat.load, now)
        view = member.view
        if refusal is not None:
            view.refuse(refusal)
            return False
        if view.synced and view.seq == heartbeat.seq:
            view.confirmed_at = now
        return not view.synced and not self._streams(member, now)

    def apply_sync(self, snapshot: Snapshot, now: float) -> None:
        """See `Fleet.apply_sync`."""
        refusal = self._config.mismatch(snapshot.info)
        if refusal is not None and refusal.reason is not RejectReason.NO_TOKENIZER:
            raise refusal
        member = self._owner(snapshot.info.worker_id)
        member.view.check_epoch(snapshot.info.epoch)
        member.heard(now)
        self._meet(member, snapshot.info, snapshot.load, now)
        if refusal is not None:
            member.view.refuse(refusal)
        elif not self._streams(member, now):
            member.view.install(snapshot, now)

    def apply_eviction(self, eviction: Eviction, now: float) -> None:
        """See `Fleet.apply_eviction`."""
        member = self._owner(eviction.worker_id)
        member.view.check_epoch(eviction.epoch)
        if not self._streams(member, now):
            member.view.evict(eviction)
        member.heard(now)

    def _meet(self, member: Member, info: WorkerInfo, load: Load, now: float) -> None:
        if member.view.epoch != info.epoch:
            member.work.forget_report()
            member.heat.clear()
            member.renewed()
        member.view.meet(info)
        member.work.report(load, now)

    def _streams(self, member: Member, now: float) -> bool:
        """Whether the worker's own stream is live, which is fresher than any push."""
        pulled = member.view.pulled_at
        return pulled is not None and member.view.synced and now - pulled <= self._config.liveness_timeout
