"""The states of a worker and how it moves between them."""

from __future__ import annotations

from itertools import product

import pytest

from router.core.decision import NoWorkerReady
from router.core.fleet import Fleet
from router.core.outliers import Outcome, OutlierPolicy
from router.core.worker_state import Circuit, Contact, Event, Intake, Life, State, transition
from tests.router.core.support import MakeFleet, ask, config, tokens, url_of

EVERY = [Life(*facts) for facts in product(Contact, Intake, Circuit)]


def after(*events: Event) -> Life:
    life = Life()
    for event in events:
        life = transition(life, event)
    return life


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((), State.STARTING),
        ((Event.HEARD,), State.SERVING),
        ((Event.HEARD, Event.LOST), State.UNREACHABLE),
        ((Event.HEARD, Event.UNMASKED), State.AGENT),
        ((Event.UNMASKED, Event.HEARD), State.AGENT),
        ((Event.UNMASKED, Event.LOST, Event.HEARD), State.SERVING),
        ((Event.HEARD, Event.DRAINS), State.DRAINING),
        ((Event.HEARD, Event.DRAINS, Event.CLOSES), State.CLOSED),
        ((Event.HEARD, Event.CLOSES, Event.LOST, Event.HEARD), State.CLOSED),
        ((Event.HEARD, Event.CLOSES, Event.OPENED), State.SERVING),
        ((Event.HEARD, Event.PAUSED), State.PAUSED),
        ((Event.HEARD, Event.PAUSED, Event.RESUMED), State.SERVING),
        ((Event.HEARD, Event.PAUSED, Event.EJECTED, Event.RESUMED), State.EJECTED),
        ((Event.HEARD, Event.EJECTED, Event.RECOVERED), State.EJECTED),
        ((Event.HEARD, Event.EJECTED, Event.PROBED), State.HALF_OPEN),
        ((Event.HEARD, Event.EJECTED, Event.PROBED, Event.EJECTED), State.EJECTED),
        ((Event.HEARD, Event.EJECTED, Event.PROBED, Event.PAUSED), State.HALF_OPEN),
        ((Event.HEARD, Event.EJECTED, Event.PROBED, Event.RECOVERED), State.SERVING),
        ((Event.HEARD, Event.EJECTED, Event.CLOSES), State.CLOSED),
        ((Event.HEARD, Event.EJECTED, Event.LOST), State.UNREACHABLE),
        ((Event.HEARD, Event.PROBED), State.SERVING),
    ],
)
def test_where_events_lead(events: tuple[Event, ...], state: State) -> None:
    assert after(*events).state is state


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("life", EVERY)
def test_an_event_changes_one_thing_at_most_and_the_same_one_again_nothing(life: Life, event: Event) -> None:
    once = transition(life, event)
    assert sum(was is not became for was, became in zip(life, once, strict=True)) <= 1
    assert transition(once, event) == once


@pytest.mark.parametrize("life", EVERY)
def test_requests_go_only_where_somebody_was_heard_from_and_takes_them(life: Life) -> None:
    if life.state in (State.SERVING, State.HALF_OPEN, State.PAUSED, State.EJECTED):
        assert (life.contact, life.intake) == (Contact.ALIVE, Intake.OPEN)


@pytest.mark.parametrize(
    ("states", "exclude", "expected"),
    [
        ((State.SERVING, State.SERVING), (), (0, 1)),
        ((State.SERVING, State.DRAINING), (), (0,)),
        ((State.SERVING, State.DRAINING), (0,), (1,)),
        ((State.CLOSED, State.DRAINING), (), (1,)),
        ((State.CLOSED, State.UNREACHABLE), (), ()),
        ((State.SERVING, State.PAUSED), (), (0,)),
        ((State.SERVING, State.PAUSED), (0,), ()),
        ((State.PAUSED, State.PAUSED), (), (0, 1)),
        ((State.PAUSED, State.PAUSED), (0,), (1,)),
        ((State.PAUSED, State.DRAINING), (), (1,)),
        ((State.SERVING, State.EJECTED), (), (0,)),
        ((State.SERVING, State.EJECTED), (0,), ()),
        ((State.PAUSED, State.EJECTED), (), (0,)),
        ((State.UNREACHABLE, State.EJECTED), (), (1,)),
        ((State.HALF_OPEN, State.SERVING), (), (0, 1)),
    ],
)
def test_the_best_there_are_are_chosen(
    states: tuple[State, ...], exclude: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    fleet = Fleet(config(outliers=OutlierPolicy(share=1.0), liveness_timeout=100.0))
    for number, state in enumerate(states):
        fleet.add(url_of(number))
        fleet.heard(url_of(number), 0.0)
        if state is State.HALF_OPEN:
            eject(fleet, number, 0.0)
    fleet.expire(10.0)  # the first ejection is over
    for number, state in enumerate(states):
        match state:
            case State.DRAINING:
                fleet.set_intake(url_of(number), Intake.DRAINING)
            case State.CLOSED:
                fleet.set_intake(url_of(number), Intake.CLOSED)
            case State.UNREACHABLE:
                fleet.set_reachable(url_of(number), False, 10.0)
            case State.PAUSED:
                fleet.turned_away(url_of(number), None, 10.0)
            case State.EJECTED:
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
    assert fleet.workers(0.0)[0].state is State.EJECTED
    for tick in range(1, 41):
        for number in range(2):
            fleet.heard(url_of(number), tick / 4)
        fleet.expire(tick / 4)
    assert fleet.workers(10.0)[0].state is State.HALF_OPEN
    request = ask(tokens(2))
    decision = fleet.choose(request, 10.0, {url_of(1)})
    ticket = fleet.dispatch(decision, request, 10.0)
    assert [each.url for each in fleet.choose(request, 10.0).candidates] == [url_of(1)]
    ticket.release(10.1)
    assert [each.url for each in fleet.choose(request, 10.1).candidates] == [url_of(0), url_of(1)]
