"""The states of a worker, how it moves between them, and in which of them it gets requests.

Not covered: what leads to the events (test_liveness.py, test_outliers.py, test_feed.py).
"""

from __future__ import annotations

from enum import Enum
from itertools import product

import pytest

from router.core.decision import NoWorkerReady
from router.core.fleet import Fleet
from router.core.outliers import Outcome, OutlierPolicy
from router.core.worker_state import Circuit, Intake, Liveness, WorkerEvent, WorkerPhase, WorkerState, transition
from tests.router.core.support import MakeFleet, ask, config, tokens, url_of

EVERY = [WorkerState(*facts) for facts in product(Liveness, Intake, Circuit)]
HEARD, LOST, AGENT = WorkerEvent.HEARD, WorkerEvent.LOST, WorkerEvent.FOUND_TO_BE_AGENT
TURNED_AWAY, EJECTED, EJECTION_ENDED = WorkerEvent.TURNED_AWAY, WorkerEvent.EJECTED, WorkerEvent.EJECTION_ENDED


def after(*events: WorkerEvent) -> WorkerState:
    state = WorkerState()
    for event in events:
        state = transition(state, event)
    return state


def named(value: object) -> str | None:
    """The id of a parameter: names of states and events, joined."""
    if isinstance(value, WorkerState):
        return "-".join(fact.name.lower() for fact in value)
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, tuple):
        return ",".join(str(named(item) or item) for item in value) or "none"
    return None


@pytest.mark.parametrize(
    ("events", "phase"),
    [
        ((), WorkerPhase.STARTING),
        ((HEARD,), WorkerPhase.SERVING),
        ((HEARD, LOST), WorkerPhase.UNREACHABLE),
        ((HEARD, WorkerEvent.EXCUSED), WorkerPhase.SERVING),
        ((HEARD, WorkerEvent.EXCUSED, LOST), WorkerPhase.UNREACHABLE),
        ((LOST, WorkerEvent.EXCUSED), WorkerPhase.UNREACHABLE),
        ((HEARD, AGENT), WorkerPhase.AGENT),
        ((AGENT, HEARD), WorkerPhase.AGENT),
        ((AGENT, LOST, HEARD), WorkerPhase.SERVING),
        ((HEARD, WorkerEvent.DRAINING), WorkerPhase.DRAINING),
        ((HEARD, WorkerEvent.DRAINING, WorkerEvent.CLOSED), WorkerPhase.CLOSED),
        ((HEARD, WorkerEvent.CLOSED, LOST, HEARD), WorkerPhase.CLOSED),
        ((HEARD, WorkerEvent.CLOSED, WorkerEvent.OPENED), WorkerPhase.SERVING),
        ((HEARD, TURNED_AWAY), WorkerPhase.PAUSED),
        ((HEARD, TURNED_AWAY, WorkerEvent.PAUSE_ENDED), WorkerPhase.SERVING),
        ((HEARD, TURNED_AWAY, WorkerEvent.ANSWERED), WorkerPhase.SERVING),
        ((HEARD, WorkerEvent.TURNED_AWAY_UNTIL, WorkerEvent.ANSWERED), WorkerPhase.PAUSED),
        ((HEARD, WorkerEvent.TURNED_AWAY_UNTIL, WorkerEvent.PAUSE_ENDED), WorkerPhase.SERVING),
        ((HEARD, TURNED_AWAY, WorkerEvent.RESTARTED), WorkerPhase.SERVING),
        ((HEARD, TURNED_AWAY, EJECTED, WorkerEvent.PAUSE_ENDED), WorkerPhase.EJECTED),
        ((HEARD, EJECTED, WorkerEvent.RECOVERED), WorkerPhase.EJECTED),
        ((HEARD, EJECTED, EJECTION_ENDED), WorkerPhase.HALF_OPEN),
        ((HEARD, EJECTED, WorkerEvent.RESTARTED), WorkerPhase.HALF_OPEN),
        ((HEARD, EJECTED, EJECTION_ENDED, EJECTED), WorkerPhase.EJECTED),
        ((HEARD, EJECTED, EJECTION_ENDED, TURNED_AWAY), WorkerPhase.HALF_OPEN),
        ((HEARD, EJECTED, EJECTION_ENDED, WorkerEvent.RECOVERED), WorkerPhase.SERVING),
        ((HEARD, EJECTED, WorkerEvent.CLOSED), WorkerPhase.CLOSED),
        ((HEARD, EJECTED, LOST), WorkerPhase.UNREACHABLE),
        ((HEARD, EJECTION_ENDED), WorkerPhase.SERVING),
        ((HEARD, WorkerEvent.REMOVED, HEARD), WorkerPhase.GONE),
    ],
    ids=named,
)
def test_where_events_lead(events: tuple[WorkerEvent, ...], phase: WorkerPhase) -> None:
    assert after(*events).phase is phase


@pytest.mark.parametrize("event", list(WorkerEvent), ids=named)
def test_an_event_changes_one_fact_at_most_and_the_same_one_again_nothing(event: WorkerEvent) -> None:
    for state in EVERY:
        once = transition(state, event)
        assert sum(was is not became for was, became in zip(state, once, strict=True)) <= 1
        assert transition(once, event) == once


@pytest.mark.parametrize("phase", list(WorkerPhase), ids=named)
def test_a_phase_that_may_get_requests_needs_a_reachable_worker_that_takes_them(phase: WorkerPhase) -> None:
    states = [state for state in EVERY if state.phase is phase]
    assert states
    if phase in (WorkerPhase.SERVING, WorkerPhase.HALF_OPEN, WorkerPhase.PAUSED, WorkerPhase.EJECTED):
        assert {state.liveness for state in states} == {Liveness.ALIVE, Liveness.OVERDUE}
        assert {state.intake for state in states} == {Intake.OPEN}


@pytest.mark.parametrize("event", list(WorkerEvent), ids=named)
def test_a_worker_that_was_removed_does_not_come_back(event: WorkerEvent) -> None:
    assert transition(after(HEARD, WorkerEvent.REMOVED), event).phase is WorkerPhase.GONE


@pytest.mark.parametrize(
    ("states", "exclude", "expected"),
    [
        ((WorkerPhase.SERVING, WorkerPhase.SERVING), (), (0, 1)),
        ((WorkerPhase.SERVING, WorkerPhase.DRAINING), (), (0,)),
        ((WorkerPhase.SERVING, WorkerPhase.DRAINING), (0,), (1,)),
        ((WorkerPhase.CLOSED, WorkerPhase.DRAINING), (), (1,)),
        ((WorkerPhase.CLOSED, WorkerPhase.UNREACHABLE), (), ()),
        ((WorkerPhase.SERVING, WorkerPhase.PAUSED), (), (0,)),
        ((WorkerPhase.SERVING, WorkerPhase.PAUSED), (0,), ()),
        ((WorkerPhase.PAUSED, WorkerPhase.PAUSED), (), (0, 1)),
        ((WorkerPhase.PAUSED, WorkerPhase.PAUSED), (0,), (1,)),
        ((WorkerPhase.PAUSED, WorkerPhase.DRAINING), (), (1,)),
        ((WorkerPhase.SERVING, WorkerPhase.EJECTED), (), (0,)),
        ((WorkerPhase.SERVING, WorkerPhase.EJECTED), (0,), ()),
        ((WorkerPhase.PAUSED, WorkerPhase.EJECTED), (), (0,)),
        ((WorkerPhase.UNREACHABLE, WorkerPhase.EJECTED), (), (1,)),
        ((WorkerPhase.HALF_OPEN, WorkerPhase.SERVING), (), (0, 1)),
    ],
    ids=named,
)
def test_the_best_there_are_are_chosen(
    states: tuple[WorkerPhase, ...], exclude: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    fleet = Fleet(config(outliers=OutlierPolicy(share=1.0), liveness_timeout=100.0))
    for number, state in enumerate(states):
        fleet.add(url_of(number))
        fleet.mark_alive(url_of(number), 0.0)
        if state is WorkerPhase.HALF_OPEN:
            eject(fleet, number, 0.0)
    fleet.expire(10.0)  # the first ejection is over
    for number, state in enumerate(states):
        match state:
            case WorkerPhase.DRAINING:
                fleet.set_intake(url_of(number), Intake.DRAINING)
            case WorkerPhase.CLOSED:
                fleet.set_intake(url_of(number), Intake.CLOSED)
            case WorkerPhase.UNREACHABLE:
                fleet.mark_unreachable(url_of(number))
            case WorkerPhase.PAUSED:
                fleet.turned_away(url_of(number), None, 10.0)
            case WorkerPhase.EJECTED:
                eject(fleet, number, 10.0)
    assert tuple(worker.state for worker in fleet.workers(10.0)) == states
    exclusion = set(map(url_of, exclude))
    if expected:
        chosen = fleet.choose(ask(tokens(2)), 10.0, exclusion)
        assert [candidate.url for candidate in chosen.candidates] == list(map(url_of, expected))
    else:
        with pytest.raises(NoWorkerReady):
            fleet.choose(ask(tokens(2)), 10.0, exclusion)


def eject(fleet: Fleet, number: int, now: float) -> None:
    for _ in range(OutlierPolicy().consecutive):
        fleet.answered(url_of(number), Outcome.BAD, now)


def test_a_worker_on_probation_gets_one_request_at_a_time(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    eject(fleet, 0, 0.0)
    assert fleet.workers(0.0)[0].state is WorkerPhase.EJECTED
    for tick in range(1, 41):
        for number in range(2):
            fleet.mark_alive(url_of(number), tick / 4)
        fleet.expire(tick / 4)
    assert fleet.workers(10.0)[0].state is WorkerPhase.HALF_OPEN
    request = ask(tokens(2))
    decision = fleet.choose(request, 10.0, {url_of(1)})
    ticket = fleet.dispatch(decision, request, 10.0)
    assert [each.url for each in fleet.choose(request, 10.0).candidates] == [url_of(1)]
    ticket.release(10.1)
    assert [each.url for each in fleet.choose(request, 10.1).candidates] == [url_of(0), url_of(1)]
