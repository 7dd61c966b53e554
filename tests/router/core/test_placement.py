"""Where flow control finds room: which workers have some, and when time alone will make some.

Not covered: the order in which requests are placed (tests/router/core/test_flow.py).
"""

from __future__ import annotations

import math

import pytest

from router.core.decision import RouteRequest
from router.core.flow import Verdict, Waiting
from router.core.placement import Placement
from tests.router.core.support import MakeFleet, ask, hold, send, tokens, url_of

LIMIT = 0.02


def waiting(route: RouteRequest) -> Waiting:
    return Waiting(route, 100, 0.0, lambda reason: None)


def test_a_request_whose_worker_has_room_is_placed_and_charged_for_what_it_computes(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    hold(fleet, 0, tokens(10), 8)

    place = Placement(fleet, LIMIT).place(waiting(ask(tokens(10))), False, 0.0)

    assert place.verdict is Verdict.PLACED
    assert place.tokens == len(tokens(10)) - 8 * 4


def test_where_no_worker_has_room_the_first_to_have_some_says_when_to_look_again(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    for number, blocks in enumerate((100, 60)):
        hold(fleet, number, tokens(1, start=1000 * number), 1)
        decision, _ = send(fleet, ask(tokens(blocks, start=10_000 * (number + 1))), 0.0)
        assert decision.url == url_of(number)
    route = ask(tokens(5, start=50_000))
    placement = Placement(fleet, LIMIT)

    place = placement.place(waiting(route), False, 0.0)

    assert place.verdict is Verdict.FULL
    assert place.room_in == pytest.approx(min(fleet.waits(route, 0.0).values()) - LIMIT)
    assert placement.place(waiting(route), False, place.room_in + 1e-6).verdict is Verdict.PLACED


def test_a_request_that_prefers_a_full_worker_is_looked_at_again_when_that_one_has_room(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    prompt = tokens(200)
    hold(fleet, 0, prompt, 200)
    send(fleet, ask([*prompt[:800], *tokens(40, start=70_000)]), 0.0)
    route, placement = ask(prompt), Placement(fleet, LIMIT)
    waits = fleet.waits(route, 0.0)

    place = placement.place(waiting(route), False, 0.0)

    assert waits[url_of(1)] <= LIMIT < waits[url_of(0)], "the other worker has room"
    assert place.verdict is Verdict.PREFERS_FULL
    assert place.room_in == pytest.approx(waits[url_of(0)] - LIMIT)
    assert placement.place(waiting(route), False, place.room_in + 1e-6).verdict is Verdict.PLACED
    anywhere = waiting(route)
    assert placement.place(anywhere, True, 0.0).verdict is Verdict.PLACED
    assert anywhere.exclude == {url_of(0)}


def test_without_a_ready_worker_time_makes_no_room(make_fleet: MakeFleet) -> None:
    place = Placement(make_fleet(0), LIMIT).place(waiting(ask(tokens(3))), False, 0.0)

    assert (place.verdict, place.room_in) == (Verdict.FULL, math.inf)
