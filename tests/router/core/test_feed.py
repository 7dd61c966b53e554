"""What pulled and pushed feed messages do to the view of a worker, and which messages are refused.

Not covered: how messages travel (tests/router/sync, tests/e2e), and views that nothing confirms (test_staleness.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvcache.feed import Batch, Cleared, Event, Eviction, Heartbeat, Load, Removed, Stored, WorkerInfo
from kvcache.keys import BlockKey
from router.core.errors import (
    DuplicateWorker,
    FeedGap,
    FeedRejected,
    Mismatch,
    RejectReason,
    StaleEpoch,
    UnknownWorker,
)
from router.core.fleet import Fleet
from tests.router.core.support import BLOCK, MakeFleet, ask, config, idle, info, keys_of, snapshot, tokens, url_of

URL = url_of(0)
KEYS = keys_of(tokens(8))


def batch(seq: int, *events: Event, epoch: int = 1, load: Load | None = None) -> Batch:
    return Batch(epoch, seq, events, load or idle())


def stored(*keys: BlockKey) -> Stored:
    return Stored(None, keys)


def heartbeat(who: WorkerInfo | None = None, seq: int = 0, url: str = URL) -> Heartbeat:
    return Heartbeat(who or info(), url, seq, idle())


@pytest.fixture
def pulled(make_fleet: MakeFleet) -> Fleet:
    """One worker, w0 in epoch 1, with the first four keys at seq 5."""
    fleet = make_fleet(1)
    fleet.apply_snapshot(URL, snapshot(seq=5, keys=KEYS[:4]), 0.0)
    return fleet


@pytest.fixture
def pushed() -> Fleet:
    fleet = Fleet(config())
    assert fleet.apply_heartbeat(heartbeat(seq=5), 0.0), "a worker not seen before is asked for its state"
    fleet.apply_sync(snapshot(seq=5, keys=KEYS[:4]), 0.0)
    return fleet


# --- pull -------------------------------------------------------------------------------------------------


def test_batches_update_a_snapshot_in_order(pulled: Fleet) -> None:
    pulled.apply_batch(URL, batch(6, Removed((KEYS[3],)), stored(KEYS[0], KEYS[4])), 0.1)
    assert pulled.held_blocks(URL) == Counter([KEYS[0], *KEYS[:3], KEYS[4]])
    pulled.apply_batch(URL, batch(7, Cleared(), stored(KEYS[7])), 0.2)
    assert pulled.held_blocks(URL) == Counter([KEYS[7]])
    status = pulled.workers(0.5)[0]
    assert (status.epoch, status.seq, status.blocks) == (1, 7, 1)
    assert status.view_age == pytest.approx(0.3)


def test_a_repeated_batch_changes_nothing(pulled: Fleet) -> None:
    for _ in range(2):
        pulled.apply_batch(URL, batch(6, stored(KEYS[0])), 0.1)
    pulled.apply_batch(URL, batch(2, Cleared()), 0.1)
    assert pulled.held_blocks(URL) == Counter([KEYS[0], *KEYS[:4]])


@pytest.mark.parametrize("message", [batch(7, stored(KEYS[5])), batch(6)], ids=["events", "load report"])
def test_a_gap_is_an_error_and_leaves_the_view_as_it_is(pulled: Fleet, message: Batch) -> None:
    with pytest.raises(FeedGap):
        pulled.apply_batch(URL, message, 0.1)
    assert pulled.held_blocks(URL) == Counter(KEYS[:4])
    pulled.apply_snapshot(URL, snapshot(seq=9, keys=KEYS[:2]), 0.2)
    assert pulled.held_blocks(URL) == Counter(KEYS[:2])


def test_a_batch_before_any_snapshot_asks_for_one() -> None:
    fleet = Fleet(config())
    fleet.add(URL)
    with pytest.raises(FeedGap):
        fleet.apply_batch(URL, batch(1, stored(KEYS[0])), 0.1)
    assert fleet.workers(0.1)[0].ready, "a sign of life all the same"


def test_a_restart_drops_the_old_view_at_once(pulled: Fleet) -> None:
    with pytest.raises(FeedGap):
        pulled.apply_batch(URL, batch(1, stored(KEYS[5]), epoch=2), 0.1)
    assert pulled.held_blocks(URL) == Counter()
    pulled.apply_snapshot(URL, snapshot(info(epoch=2), 1, KEYS[5:6]), 0.2)
    assert pulled.held_blocks(URL) == Counter(KEYS[5:6])


def test_messages_of_an_earlier_incarnation_are_refused(pulled: Fleet) -> None:
    pulled.apply_snapshot(URL, snapshot(info(epoch=2), 0, KEYS[:1]), 0.1)
    with pytest.raises(StaleEpoch):
        pulled.apply_batch(URL, batch(6, Cleared()), 0.2)
    with pytest.raises(StaleEpoch):
        pulled.apply_snapshot(URL, snapshot(seq=99), 0.2)
    assert pulled.held_blocks(URL) == Counter(KEYS[:1])


def test_an_unreachable_worker_may_come_back_with_a_smaller_epoch(pulled: Fleet) -> None:
    pulled.apply_snapshot(URL, snapshot(info(epoch=20), 0, KEYS[:1]), 0.1)
    pulled.mark_unreachable(URL, "connection refused")
    pulled.apply_snapshot(URL, snapshot(info(epoch=10), 0, KEYS[:2]), 0.3)
    assert pulled.held_blocks(URL) == Counter(KEYS[:2])


def test_unknown_urls_are_refused(pulled: Fleet) -> None:
    with pytest.raises(UnknownWorker):
        pulled.apply_snapshot("http://elsewhere", snapshot(), 0.1)
    with pytest.raises(UnknownWorker):
        pulled.apply_batch("http://elsewhere", batch(1), 0.1)


def test_removals_of_unknown_blocks_are_counted(pulled: Fleet) -> None:
    pulled.apply_batch(URL, batch(6, Removed((KEYS[7], KEYS[0]))), 0.1)
    assert pulled.workers(0.1)[0].unknown_removals == 1
    assert pulled.held_blocks(URL) == Counter(KEYS[1:4])


MISMATCHES = {
    RejectReason.BLOCK_SIZE: info(epoch=2, block_size=BLOCK + 2),
    RejectReason.FINGERPRINT: info(epoch=2, fingerprint="0" * 32),
    RejectReason.KEY_SCHEME: info(epoch=2, key_scheme="xxh3"),
    RejectReason.MODEL: info(epoch=2, model="another"),
}


@pytest.mark.parametrize("reason", MISMATCHES)
def test_a_pulled_worker_that_does_not_match_is_routed_to_by_load(make_fleet: MakeFleet, reason: RejectReason) -> None:
    fleet = make_fleet(1, model="m")
    fleet.apply_snapshot(URL, snapshot(seq=5, keys=KEYS), 0.0)
    with pytest.raises(Mismatch) as error:
        fleet.apply_snapshot(URL, snapshot(MISMATCHES[reason], 3, KEYS, Load(running=3)), 0.1)
    assert error.value.reason is reason
    status = fleet.workers(0.1)[0]
    assert status.ready
    assert not status.matching
    assert status.why_not_matching == str(error.value)
    assert status.blocks == fleet.index_blocks == 0
    fleet.apply_batch(URL, batch(4, stored(KEYS[0]), epoch=2, load=Load(running=1)), 0.2)
    assert fleet.index_blocks == 0
    request = ask(tokens(8))
    decision = fleet.choose(request, 0.2)
    assert decision.matched_blocks == 0
    ticket = fleet.dispatch(decision, request, 0.2)
    assert fleet.assumed_blocks == 0, "what its keys mean is not known, so nothing is assumed of it"
    ticket.release(0.3)
    fleet.apply_snapshot(URL, snapshot(info(epoch=3, model="m"), 0, KEYS), 0.4)
    assert fleet.workers(0.4)[0].matching
    assert fleet.index_blocks == 8


# --- push -------------------------------------------------------------------------------------------------


def test_a_pushing_worker_is_a_candidate_with_what_it_synced(pushed: Fleet) -> None:
    decision = pushed.choose(ask(tokens(8)), 0.1)
    assert (decision.worker_id, decision.url, decision.matched_blocks) == ("w0", URL, 4)
    assert pushed.apply_heartbeat(heartbeat(seq=6), 1.0) is False
    pushed.apply_sync(snapshot(seq=6, keys=KEYS[:1]), 1.1)
    assert pushed.held_blocks(URL) == Counter(KEYS[:1])


def test_an_older_sync_is_ignored(pushed: Fleet) -> None:
    pushed.apply_sync(snapshot(seq=4), 0.1)
    assert pushed.held_blocks(URL) == Counter(KEYS[:4])


def test_evictions_apply_once_and_a_sync_takes_over(pushed: Fleet) -> None:
    for _ in range(2):
        pushed.apply_eviction(Eviction("w0", 1, 7, (KEYS[3], KEYS[6])), 0.1)
    pushed.apply_eviction(Eviction("w0", 1, 5, (KEYS[0],)), 0.1)
    assert pushed.held_blocks(URL) == Counter(KEYS[:3])
    pushed.apply_sync(snapshot(seq=6, keys=KEYS[:5]), 0.2)
    assert pushed.held_blocks(URL) == Counter(KEYS[:3]), "taken before the eviction: it would bring blocks back"
    pushed.apply_sync(snapshot(seq=7, keys=[*KEYS[:3], KEYS[7]]), 0.3)
    assert pushed.held_blocks(URL) == Counter([*KEYS[:3], KEYS[7]])


def test_a_heartbeat_of_a_new_incarnation_asks_for_the_state(pushed: Fleet) -> None:
    assert pushed.apply_heartbeat(heartbeat(info(epoch=2)), 0.1) is True
    assert pushed.held_blocks(URL) == Counter()
    with pytest.raises(FeedGap):
        pushed.apply_eviction(Eviction("w0", 2, 1, (KEYS[0],)), 0.2)
    pushed.apply_sync(snapshot(info(epoch=3), 1, KEYS[:2]), 0.3)
    assert pushed.held_blocks(URL) == Counter(KEYS[:2]), "a sync of a later incarnation needs no heartbeat first"


def test_the_same_incarnation_at_another_address_is_one_worker(pushed: Fleet) -> None:
    assert pushed.apply_heartbeat(heartbeat(seq=5, url="http://alias:1/"), 0.1) is False
    assert [worker.url for worker in pushed.workers(0.1)] == [URL]


def test_discovery_names_a_worker_that_its_heartbeats_named_otherwise(pushed: Fleet) -> None:
    pushed.add("http://pod:1")
    pushed.apply_snapshot("http://pod:1", snapshot(seq=6, keys=KEYS[:2]), 0.2)
    assert [(worker.url, worker.matching) for worker in pushed.workers(0.2)] == [("http://pod:1", True)]
    assert pushed.apply_heartbeat(heartbeat(seq=6), 0.3) is False
    assert len(pushed.workers(0.3)) == 1
    assert pushed.held_blocks("http://pod:1") == Counter(KEYS[:2])


def test_a_worker_that_moved_takes_its_id_along(pushed: Fleet) -> None:
    pushed.apply_heartbeat(heartbeat(info(epoch=2), url="http://moved:1/"), 0.1)
    assert [(worker.url, worker.worker_id) for worker in pushed.workers(0.1)] == [("http://moved:1", "w0")]
    with pytest.raises(StaleEpoch):
        pushed.apply_heartbeat(heartbeat(), 0.2)


PUSHES: dict[str, tuple[Callable[[Fleet], object], RejectReason]] = {
    f"{what} with another {reason.value}": (lambda fleet, act=act, who=who: act(fleet, who), reason)
    for reason, who in MISMATCHES.items()
    if reason is not RejectReason.MODEL  # it gets requests by load: tests/router/core/test_models.py
    for what, act in {
        "heartbeat": lambda fleet, who: fleet.apply_heartbeat(heartbeat(who), 1.0),
        "sync": lambda fleet, who: fleet.apply_sync(snapshot(who, 9), 1.0),
    }.items()
} | {
    "heartbeat of an old epoch": (
        lambda f: f.apply_heartbeat(heartbeat(info(epoch=0)), 1.0),
        RejectReason.STALE_EPOCH,
    ),
    "sync of an old epoch": (lambda f: f.apply_sync(snapshot(info(epoch=0), 9), 1.0), RejectReason.STALE_EPOCH),
    "eviction of an old epoch": (
        lambda f: f.apply_eviction(Eviction("w0", 0, 9, ()), 1.0),
        RejectReason.STALE_EPOCH,
    ),
    "eviction before a sync": (
        lambda f: f.apply_eviction(Eviction("w0", 2, 9, ()), 1.0),
        RejectReason.GAP,
    ),
    "sync of a stranger": (lambda f: f.apply_sync(snapshot(info("w9"), 9), 1.0), RejectReason.UNKNOWN_WORKER),
    "eviction of a stranger": (lambda f: f.apply_eviction(Eviction("w9", 1, 9, ()), 1.0), RejectReason.UNKNOWN_WORKER),
    "a url of another kind": (lambda f: f.apply_heartbeat(heartbeat(url="file:///etc"), 1.0), RejectReason.MALFORMED),
    "a url without an end": (
        lambda f: f.apply_heartbeat(heartbeat(url="http://" + "a" * 9999), 1.0),
        RejectReason.MALFORMED,
    ),
}


@pytest.mark.parametrize("name", PUSHES)
def test_a_push_that_is_refused_leaves_everything_as_it_was(name: str) -> None:
    fleet = Fleet(config(model="m"))
    fleet.apply_heartbeat(heartbeat(seq=5), 0.0)
    fleet.apply_sync(snapshot(seq=5, keys=KEYS[:4]), 0.0)
    before = (fleet.workers(2.0), fleet.held_blocks(URL), fleet.index_blocks)
    act, reason = PUSHES[name]
    with pytest.raises(FeedRejected) as error:
        act(fleet)
    assert error.value.reason is reason
    assert (fleet.workers(2.0), fleet.held_blocks(URL), fleet.index_blocks) == before


# --- both, and twice ----------------------------------------------------------------------------------------


def test_pushes_of_a_worker_whose_stream_is_live_are_signs_of_life_only(pulled: Fleet) -> None:
    pulled.apply_batch(URL, batch(6, stored(KEYS[4])), 0.1)
    assert pulled.apply_heartbeat(heartbeat(seq=9), 0.2) is False
    pulled.apply_sync(snapshot(seq=9), 0.3)
    pulled.apply_eviction(Eviction("w0", 1, 9, (KEYS[0],)), 0.3)
    assert pulled.held_blocks(URL) == Counter(KEYS[:5])
    pulled.apply_batch(URL, batch(7, stored(KEYS[5])), 0.4)
    assert pulled.held_blocks(URL) == Counter(KEYS[:6])


def test_pushes_take_over_from_a_stream_that_fell_silent_and_give_back(pulled: Fleet) -> None:
    pulled.apply_eviction(Eviction("w0", 1, 9, (KEYS[3],)), 5.0)
    assert pulled.held_blocks(URL) == Counter(KEYS[:3])
    with pytest.raises(FeedGap):
        pulled.apply_batch(URL, batch(6, Removed((KEYS[3],))), 5.1)
    pulled.apply_snapshot(URL, snapshot(seq=9, keys=KEYS[:1]), 5.2)
    pulled.apply_batch(URL, batch(10, stored(KEYS[1])), 5.3)
    assert pulled.held_blocks(URL) == Counter(KEYS[:2])


def test_of_two_urls_with_one_id_the_later_incarnation_wins(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.apply_snapshot(url_of(0), snapshot(info("same", epoch=1), 0, KEYS[:4]), 0.0)
    fleet.apply_snapshot(url_of(1), snapshot(info("same", epoch=2), 0, KEYS[:2]), 0.0)
    assert (fleet.held_blocks(url_of(0)), fleet.held_blocks(url_of(1))) == (Counter(), Counter(KEYS[:2]))
    with pytest.raises(DuplicateWorker) as error:
        fleet.apply_snapshot(url_of(0), snapshot(info("same", epoch=1), 1, KEYS[:4]), 0.1)
    assert error.value.reason is RejectReason.DUPLICATE_WORKER
    first, second = fleet.workers(0.1)
    assert (first.ready, first.matching, second.matching) == (True, False, True)
    assert url_of(1) in first.why_not_matching
    fleet.remove(url_of(1))
    with pytest.raises(FeedGap):
        fleet.apply_batch(url_of(0), batch(2), 0.3)
    fleet.apply_snapshot(url_of(0), snapshot(info("same", epoch=1), 2, KEYS[:4]), 0.3)
    assert fleet.held_blocks(url_of(0)) == Counter(KEYS[:4])


def test_an_id_whose_owner_cannot_be_reached_may_be_taken_over(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.mark_unreachable(url_of(0), "refused")
    fleet.mark_unreachable(url_of(1), "refused")
    fleet.apply_snapshot(url_of(1), snapshot(info("w0", epoch=1), 0, KEYS[:1]), 0.2)
    assert fleet.workers(0.2)[1].matching
    assert not fleet.workers(0.2)[0].matching


def test_a_worker_may_change_its_id(pulled: Fleet) -> None:
    pulled.apply_snapshot(URL, snapshot(info("renamed", epoch=2), 0, KEYS[:1]), 0.1)
    assert pulled.workers(0.1)[0].worker_id == "renamed"
    with pytest.raises(UnknownWorker):
        pulled.apply_sync(snapshot(info("w0", epoch=2)), 0.1)


# --- the view equals the worker's cache -------------------------------------------------------------------------


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["store", "remove", "clear", "restart", "reconfigure", "load"]),
        st.integers(0, 7),
        st.sampled_from(["deliver", "deliver", "deliver", "lose", "twice"]),
    ),
    max_size=80,
)


@given(CHANGES)
@settings(deadline=None)
def test_whatever_is_lost_or_repeated_the_index_ends_as_the_union_of_the_workers(
    changes: list[tuple[int, str, int, str]],
) -> None:
    """A subscriber's loop against workers that restart, some with another block size, and a network that drops and
    repeats messages. At any time a copy is that of the last message or there is none."""
    fleet = Fleet(config())
    caches = [Counter[BlockKey]() for _ in range(3)]
    epochs, seqs, sizes = [1, 1, 1], [0, 0, 0], [BLOCK] * 3

    def resync(number: int) -> None:
        who = info(f"w{number}", epochs[number], block_size=sizes[number])
        with suppress(Mismatch):
            fleet.apply_snapshot(url_of(number), snapshot(who, seqs[number], caches[number].elements()), 0.0)

    def deliver(number: int, message: Batch) -> None:
        try:
            fleet.apply_batch(url_of(number), message, 0.0)
        except FeedGap:
            resync(number)
        status, held = fleet.workers(0.0)[number], fleet.held_blocks(url_of(number))
        assert held == (Counter() if status.seq is None else caches[number])
        assert status.matching == (status.seq is not None)

    for number in range(3):
        fleet.add(url_of(number))
    for number, change, at, fate in changes:
        cache, events = caches[number], list[Event]()
        if change == "store":
            events.append(stored(*KEYS[: at + 1]))
            cache.update(KEYS[: at + 1])
        elif change == "remove" and cache[KEYS[at]]:
            events.append(Removed((KEYS[at],)))
            caches[number] = cache - Counter([KEYS[at]])
        elif change == "clear":
            events.append(Cleared())
            cache.clear()
        elif change in ("restart", "reconfigure"):
            cache.clear()
            epochs[number] += 1
            seqs[number] = 0
            if change == "reconfigure":
                sizes[number] = BLOCK + 2 if sizes[number] == BLOCK else BLOCK
        seqs[number] += bool(events)
        if fate != "lose":
            for _ in range(2 if fate == "twice" else 1):
                deliver(number, batch(seqs[number], *events, epoch=epochs[number]))
    for number in range(3):
        resync(number)  # a subscriber connects again when a process has restarted
        deliver(number, batch(seqs[number], epoch=epochs[number]))
    matched = [cache for cache, size in zip(caches, sizes, strict=True) if size == BLOCK]
    assert [worker.matching for worker in fleet.workers(0.0)] == [size == BLOCK for size in sizes]
    assert fleet.index_blocks == len(set().union(*matched))
    assert all(worker.unknown_removals == 0 for worker in fleet.workers(0.0))
