"""Ejections and pauses of workers that fail or turn requests away, with time passed in.

Not covered: which answers count as failures (tests/router/test_failures.py), and the states as such
(test_worker_state.py).
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.core.decision import NoWorkerReady
from router.core.fleet import Fleet
from router.core.outliers import PROBES, VOLUME, Ejection, EjectionReason, Outcome, OutlierPolicy
from router.core.worker_state import Intake, WorkerPhase
from tests.router.core.support import MakeFleet, ask, config, tokens, url_of

GOOD, BAD, REFUSED = Outcome.GOOD, Outcome.BAD, Outcome.REFUSED
POLICY = OutlierPolicy(consecutive=5, rate_gap=0.5, first_seconds=10.0, longest_seconds=60.0)


def fail(fleet: Fleet, number: int, now: float, times: int = 5) -> Ejection | None:
    found = [fleet.answered(url_of(number), BAD, now) for _ in range(times)]
    return found[-1]


def state(fleet: Fleet, number: int, now: float) -> WorkerPhase:
    return fleet.workers(now)[number].state


def pass_time(fleet: Fleet, since: float, until: float) -> float:
    """All workers stay alive meanwhile."""
    now = since
    while now < until:
        now = min(now + 0.25, until)
        for worker in fleet.workers(now):
            if worker.state not in (WorkerPhase.STARTING, WorkerPhase.UNREACHABLE):
                fleet.mark_alive(worker.url, now)
        fleet.expire(now)
    return now


def test_failures_in_a_row_eject_and_a_success_between_them_does_not(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, outliers=POLICY)
    for _ in range(3):
        assert fail(fleet, 0, 0.0, 4) is None
        assert fleet.answered(url_of(0), GOOD, 0.0) is None
    ejection = fail(fleet, 0, 0.0)
    assert ejection is not None
    assert (ejection.reason, ejection.seconds) == (EjectionReason.CONSECUTIVE, 10.0)
    worker = fleet.workers(1.0)[0]
    assert (worker.state, worker.ready, worker.state_until) == (WorkerPhase.EJECTED, False, 9.0)
    assert "5 requests in a row failed" in worker.why_not_ready
    assert [each.url for each in fleet.choose(ask(tokens(2)), 1.0).candidates] == [url_of(1), url_of(2)]


def test_a_rate_far_below_the_others_ejects_even_with_successes_between(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, outliers=POLICY)
    ejections = []
    for _ in range(VOLUME):
        for number in (1, 2):
            fleet.answered(url_of(number), GOOD, 0.0)
        fleet.answered(url_of(0), GOOD, 0.0)
        ejections += [fleet.answered(url_of(0), BAD, 0.0) for _ in range(4)]
    reasons = [ejection.reason for ejection in ejections if ejection is not None]
    assert reasons == [EjectionReason.RATE]


def test_what_fails_everywhere_is_nobodys_fault_by_rate(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, outliers=POLICY)
    for _ in range(VOLUME):
        for number in range(4):
            fleet.answered(url_of(number), GOOD, 0.0)
            assert [fleet.answered(url_of(number), BAD, 0.0) for _ in range(4)] == [None] * 4


def test_each_ejection_lasts_twice_as_long_until_the_worker_is_well_for_long(make_fleet: MakeFleet) -> None:
    fleet, now, durations = make_fleet(2, outliers=POLICY), 0.0, []
    ejection = fail(fleet, 0, now)
    for _ in range(5):
        assert ejection is not None
        durations.append(ejection.seconds)
        now = pass_time(fleet, now, ejection.until)
        assert state(fleet, 0, now) is WorkerPhase.HALF_OPEN
        ejection = fleet.answered(url_of(0), BAD, now)
    assert durations == [10.0, 20.0, 40.0, 60.0, 60.0]
    assert ejection is not None
    assert ejection.reason is EjectionReason.PROBE
    now = pass_time(fleet, now, ejection.until)
    for _ in range(PROBES):
        fleet.answered(url_of(0), GOOD, now)
    assert state(fleet, 0, now) is WorkerPhase.SERVING
    now = pass_time(fleet, now, now + 60 * 3 + 40 + 20 + 10)
    ejection = fail(fleet, 0, now)
    assert ejection is not None
    assert ejection.seconds == 10.0


def test_the_only_worker_is_never_ejected(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, outliers=POLICY)
    assert fail(fleet, 0, 0.0, 50) is None
    assert fleet.choose(ask(tokens(2)), 0.0).url == url_of(0)


def test_zero_failures_mean_never(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, outliers=OutlierPolicy(consecutive=0))
    assert fail(fleet, 0, 0.0, 50) is None


def test_when_others_leave_the_ejections_that_are_too_many_end(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, outliers=POLICY)
    fail(fleet, 0, 0.0)
    fail(fleet, 1, 1.0)
    assert [state(fleet, number, 1.0) for number in range(4)] == [WorkerPhase.EJECTED] * 2 + [WorkerPhase.SERVING] * 2
    fleet.mark_unreachable(url_of(2), "refused")
    assert [state(fleet, number, 1.5) for number in (0, 1)] == [WorkerPhase.HALF_OPEN, WorkerPhase.EJECTED]
    fleet.set_intake(url_of(3), Intake.CLOSED)
    fleet.remove(url_of(2))
    assert [state(fleet, number, 1.5) for number in (0, 1)] == [WorkerPhase.HALF_OPEN, WorkerPhase.EJECTED]
    fleet.remove(url_of(0))
    assert state(fleet, 0, 1.5) is WorkerPhase.HALF_OPEN, "it is the last that takes requests"


def test_a_new_incarnation_is_not_ejected_for_what_the_last_one_did(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, outliers=POLICY)
    fail(fleet, 0, 0.0)
    fleet.turned_away(url_of(1), 20.0, 0.0)
    for number in (0, 1):
        fleet.mark_unreachable(url_of(number), "refused")
        fleet.mark_alive(url_of(number), 1.0)
    assert [state(fleet, number, 1.0) for number in (0, 1)] == [WorkerPhase.HALF_OPEN, WorkerPhase.SERVING]


def test_refusals_of_what_others_answer_eject_a_worker_that_refuses_everything_only(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, outliers=POLICY)
    for _ in range(5 * VOLUME):  # it lacks one adapter: refuses those requests and serves the rest
        assert fleet.answered(url_of(0), REFUSED, 0.0) is None
        assert fleet.answered(url_of(0), REFUSED, 0.0) is None
        for number in range(3):
            fleet.answered(url_of(number), GOOD, 0.0)
    assert [fleet.answered(url_of(0), REFUSED, 0.0) is None for _ in range(5)] == [True] * 4 + [False]


# --- pauses ---


def test_each_pause_of_a_worker_that_turns_requests_away_is_longer(make_fleet: MakeFleet) -> None:
    fleet, now, pauses = make_fleet(2), 0.0, []
    for _ in range(7):
        fleet.turned_away(url_of(0), None, now)
        left = fleet.workers(now)[0].state_until
        assert left is not None
        pauses.append(left)
        assert fleet.choose(ask(tokens(2)), now).url == url_of(1)
        now = pass_time(fleet, now, now + left)
        assert state(fleet, 0, now) is WorkerPhase.SERVING
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    fleet.answered(url_of(0), GOOD, now)
    fleet.turned_away(url_of(0), None, now)
    assert fleet.workers(now)[0].state_until == 1.0


def test_many_turned_away_at_once_are_one_pause(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    for _ in range(50):
        fleet.turned_away(url_of(0), None, 0.0)
    assert fleet.workers(0.0)[0].state_until == 1.0


def test_the_time_that_a_worker_asks_for_is_kept_within_bounds(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.turned_away(url_of(0), 7.0, 0.0)
    fleet.answered(url_of(0), GOOD, 1.0)
    assert fleet.workers(1.0)[0].state_until == 6.0, "it said how long, whatever it finishes meanwhile"
    fleet.turned_away(url_of(0), 3600.0, 2.0)
    assert fleet.workers(2.0)[0].state_until == 30.0


def test_without_a_stated_time_an_answer_ends_the_pause(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.turned_away(url_of(0), None, 0.0)
    fleet.answered(url_of(0), GOOD, 0.1)
    assert state(fleet, 0, 0.1) is WorkerPhase.SERVING


def test_a_fleet_that_is_full_everywhere_ejects_nobody_and_goes_on(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, outliers=POLICY)
    for number in range(4):
        for _ in range(20):
            assert fleet.turned_away(url_of(number), None, 0.0) is None
    assert len(fleet.choose(ask(tokens(2)), 0.0).candidates) == 4


def test_outcomes_of_a_worker_that_is_gone_change_nothing(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    assert fleet.answered("http://gone", BAD, 0.0) is None
    assert fleet.turned_away("http://gone", 1.0, 0.0) is None
    assert fleet.silent_for("http://gone", 0.0) == 0.0


@settings(max_examples=15, stateful_step_count=60, deadline=None)
class Fleets(RuleBasedStateMachine):
    """Whatever happens: not too many are ejected, for no longer than stated, and only those that failed."""

    numbers = st.integers(0, 4)

    @initialize()
    def start(self) -> None:
        self.fleet = Fleet(config(outliers=POLICY))
        self.now = 0.0
        self.blameless = set(range(5))
        self.ejected_until: dict[int, float] = {}
        for number in range(5):
            self.fleet.add(url_of(number))

    @rule(number=numbers, outcome=st.sampled_from([GOOD, BAD, BAD, BAD, REFUSED]), times=st.integers(1, 6))
    def answer(self, number: int, outcome: Outcome, times: int) -> None:
        for _ in range(times):
            if outcome is not GOOD:
                self.blameless.discard(number)
            ejection = self.fleet.answered(url_of(number), outcome, self.now)
            if ejection is not None:
                assert 10.0 <= ejection.seconds <= 60.0
                self.ejected_until[number] = ejection.until

    @rule(number=numbers, wait=st.none() | st.floats(0, 100))
    def turn_away(self, number: int, wait: float | None) -> None:
        self.blameless.discard(number)
        ejection = self.fleet.turned_away(url_of(number), wait, self.now)
        if ejection is not None:
            self.ejected_until[number] = ejection.until

    @rule(number=numbers)
    def hear(self, number: int) -> None:
        self.fleet.mark_alive(url_of(number), self.now)

    @rule(number=numbers)
    def lose(self, number: int) -> None:
        self.fleet.mark_unreachable(url_of(number), "refused")

    @rule(number=numbers, intake=st.sampled_from(list(Intake)))
    def change_intake(self, number: int, intake: Intake) -> None:
        self.fleet.set_intake(url_of(number), intake)

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0, 20.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.now = pass_time(self.fleet, self.now, self.now + seconds)

    def states(self) -> list[WorkerPhase]:
        return [worker.state for worker in self.fleet.workers(self.now)]

    @invariant()
    def at_most_half_are_ejected(self) -> None:
        states = self.states()
        fleet = sum(
            each in (WorkerPhase.SERVING, WorkerPhase.PAUSED, WorkerPhase.HALF_OPEN, WorkerPhase.EJECTED)
            for each in states
        )
        assert states.count(WorkerPhase.EJECTED) <= fleet // 2

    @invariant()
    def those_that_did_nothing_wrong_are_in(self) -> None:
        states = self.states()
        wrong = (WorkerPhase.EJECTED, WorkerPhase.HALF_OPEN, WorkerPhase.PAUSED)
        assert all(states[number] not in wrong for number in self.blameless)

    @invariant()
    def no_ejection_outlasts_its_time(self) -> None:
        for number, each in enumerate(self.states()):
            if each is WorkerPhase.EJECTED:
                assert self.now < self.ejected_until[number] + 0.25

    @invariant()
    def a_request_finds_a_worker_whenever_one_is_there_and_never_a_bad_one_before_a_good_one(self) -> None:
        states = self.states()
        try:
            decision = self.fleet.choose(ask(tokens(2)), self.now)
        except NoWorkerReady:
            assert set(states) <= {WorkerPhase.STARTING, WorkerPhase.UNREACHABLE, WorkerPhase.CLOSED}
            return
        found = {states[int(candidate.url.split("-")[1].split(":")[0])] for candidate in decision.candidates}
        if WorkerPhase.SERVING in states:
            assert found <= {WorkerPhase.SERVING, WorkerPhase.HALF_OPEN}


TestFleets = Fleets.TestCase


@pytest.mark.parametrize(("share", "fleet", "most"), [(0.5, 1, 0), (0.5, 2, 1), (0.5, 5, 2), (0.0, 4, 0), (1.0, 4, 4)])
def test_how_many_may_be_ejected(share: float, fleet: int, most: int) -> None:
    assert OutlierPolicy(share=share).most(fleet) == most
