"""When a worker counts as alive, and what becomes of one that does not.

Not covered: probes and connections (tests/router/sync), and workers that answer badly (test_outliers.py).
"""

from __future__ import annotations

import pytest

from kvcache.feed import Heartbeat
from router.core.decision import NoWorkerReady
from router.core.errors import UnknownWorker
from router.core.fleet import Fleet
from router.core.worker_state import Intake
from tests.router.core.support import MakeFleet, ask, config, idle, info, tokens, url_of


def ready(fleet: Fleet, now: float) -> list[str]:
    return [worker.worker_id for worker in fleet.workers(now) if worker.ready]


def test_a_worker_is_no_candidate_until_it_is_heard_from() -> None:
    fleet = Fleet(config())
    fleet.add(url_of(0))
    with pytest.raises(NoWorkerReady) as error:
        fleet.choose(ask(tokens(2)), 0.0)
    assert error.value.retry_after > 0
    assert "not been heard" in fleet.workers(0.0)[0].why_not_ready
    fleet.mark_alive(url_of(0), 1.0)
    decision = fleet.choose(ask(tokens(2)), 1.0)
    assert decision.url == decision.worker_id == url_of(0), "no view yet: routed to by load, named by its URL"


def test_a_silent_worker_leaves_and_comes_back_with_its_view(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    for now in (0.5, 1.0, 1.5, 2.0):
        fleet.mark_alive(url_of(0), now)
        assert fleet.expire(now) == []
    fleet.mark_alive(url_of(0), 2.4)
    assert fleet.expire(2.5) == [url_of(1)]
    assert fleet.expire(2.9) == [], "it is reported once"
    assert ready(fleet, 2.9) == ["w0"]
    assert "silent" in fleet.workers(2.9)[1].why_not_ready
    fleet.mark_alive(url_of(1), 3.0)
    assert ready(fleet, 3.0) == ["w0", "w1"]
    assert fleet.workers(3.0)[1].matching


def test_a_router_that_was_held_up_itself_does_not_throw_its_fleet_out(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    fleet.expire(0.5)
    assert fleet.expire(30.0) == [], "it had no chance to read their signs of life"
    fleet.mark_alive(url_of(0), 30.1)
    for now in (30.5, 31.0, 31.5, 32.0):
        fleet.mark_alive(url_of(0), now)
        assert fleet.expire(now) == []
    fleet.mark_alive(url_of(0), 32.4)
    assert sorted(fleet.expire(32.5)) == [url_of(1), url_of(2)]


def test_the_benefit_of_the_doubt_is_given_once(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.expire(0.0)
    left = []
    for now in (3.0, 4.5, 6.0):  # every call comes late
        fleet.mark_alive(url_of(0), now)
        left += fleet.expire(now)
    assert left == [url_of(1)]


def test_a_terminating_worker_gets_nothing_new(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.set_intake(url_of(0), Intake.CLOSED)
    assert {fleet.choose(ask(tokens(2, start=9 * n)), 0.0).worker_id for n in range(5)} == {"w1"}
    assert fleet.workers(0.0)[0].why_not_ready == "it is terminating or not ready"
    fleet.mark_alive(url_of(0), 0.1)
    assert ready(fleet, 0.1) == ["w1"]


def test_why_a_worker_cannot_be_reached_is_told(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.mark_unreachable(url_of(0), "connection refused")
    assert fleet.workers(0.1)[0].why_not_ready == "connection refused"
    with pytest.raises(NoWorkerReady):
        fleet.choose(ask(tokens(1)), 0.1)


def test_excluded_workers_are_not_chosen(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    assert fleet.choose(ask(tokens(2)), 0.0, {url_of(0)}).worker_id == "w1"
    with pytest.raises(NoWorkerReady):
        fleet.choose(ask(tokens(2)), 0.0, [url_of(0), url_of(1)])


def test_workers_known_by_heartbeats_alone_are_forgotten_after_long_silence() -> None:
    fleet = Fleet(config(forget_after=10.0))
    fleet.add(url_of(1))
    fleet.apply_heartbeat(Heartbeat(info("pushed"), url_of(0), 0, idle()), 0.0)
    now = 0.0
    while now < 9.5:
        now += 0.5
        fleet.expire(now)
    assert [worker.url for worker in fleet.workers(now)] == [url_of(1), url_of(0)]
    while now < 11:
        now += 0.5
        fleet.expire(now)
    assert [worker.url for worker in fleet.workers(now)] == [url_of(1)]


def test_a_worker_removed_is_unknown_and_its_tickets_still_close(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    request = ask(tokens(5))
    decision = fleet.choose(request, 0.0)
    ticket = fleet.dispatch(decision, request, 0.0)
    fleet.remove(decision.url)
    fleet.remove(decision.url)
    assert fleet.assumed_blocks == 0
    with pytest.raises(UnknownWorker):
        fleet.mark_alive(decision.url, 0.2)
    with pytest.raises(UnknownWorker):
        fleet.dispatch(decision, request, 0.2)
    fleet.add("http://new")  # takes the slot
    fleet.mark_alive("http://new", 0.3)
    ticket.first_token(0.4)
    ticket.release(0.5)
    fleet.expire(5.0)
    assert all(worker.in_flight == 0 for worker in fleet.workers(5.0))
