"""Which worker stores a response, by the response's id and the states of the workers.

Covered: tags of workers and ranks, ids without a tag, workers that drain, are away or have left. Not covered: what a
client gets (tests/router/test_stored_responses.py).
"""

from __future__ import annotations

import dataclasses

import pytest

from kvcache.ranks import rank_url
from router.core.decision import DecisionReason, NoWorkerReady
from router.core.fleet import Fleet
from router.core.stored_responses import HolderGone, holder_tag, response_id, stored_response
from router.core.worker_state import Intake
from tests.router.core.support import MakeFleet, ask, info, snapshot, tokens, url_of

UNIQUE = "0123456789abcdef" * 2


def choose(fleet: Fleet, name: str, exclude: frozenset[str] = frozenset()) -> str:
    request = dataclasses.replace(ask(tokens(3)), keys=None, stored=stored_response(name))
    decision = fleet.choose(request, 0.0, exclude)
    assert decision.reason is DecisionReason.STORED_RESPONSE
    return decision.url


def test_an_id_says_who_stores_the_response(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    for number in range(3):
        assert choose(fleet, response_id(UNIQUE, url_of(number))) == url_of(number)


def test_the_ranks_of_a_process_store_in_one_place() -> None:
    assert holder_tag("http://a:8000#rank=1") == holder_tag("http://a:8000") != holder_tag("http://a:8001")


def test_any_rank_of_the_process_is_asked(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    for rank in range(2):
        url = rank_url("http://w:8000", rank)
        fleet.add(url)
        fleet.apply_snapshot(url, snapshot(info(f"w-{rank}", rank=rank, ranks=2)), 0.0)
    name = response_id(UNIQUE, rank_url("http://w:8000", 1))
    assert choose(fleet, name) == rank_url("http://w:8000", 0)
    assert choose(fleet, name, frozenset({rank_url("http://w:8000", 0)})) == rank_url("http://w:8000", 1)


def test_a_tag_is_the_same_in_every_router_of_every_release() -> None:
    assert response_id(UNIQUE, "http://10.0.0.7:8000") == f"resp_{UNIQUE}_{holder_tag('http://10.0.0.7:8000')}"
    assert holder_tag("http://10.0.0.7:8000") == "9982b0408257"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param(f"resp_{UNIQUE}", id="vLLM's own"),
        pytest.param(response_id(UNIQUE, url_of(0)).upper(), id="upper case"),
        pytest.param(response_id(UNIQUE, url_of(0)) + "\n", id="line end"),
        pytest.param("é" * 50, id="not ASCII"),
    ],
)
def test_an_id_without_a_tag_is_known_only_where_there_is_one_worker(make_fleet: MakeFleet, name: str) -> None:
    assert stored_response(name).tag is None
    with pytest.raises(HolderGone):
        choose(make_fleet(2), name)
    assert choose(make_fleet(1), name) == url_of(0)


def test_a_worker_that_left_is_gone_and_one_that_is_away_is_not(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    name = response_id(UNIQUE, url_of(0))
    fleet.set_intake(url_of(0), Intake.DRAINING)
    assert choose(fleet, name) == url_of(0)
    with pytest.raises(NoWorkerReady) as failed_just_now:
        choose(fleet, name, frozenset({url_of(0)}))
    assert not isinstance(failed_just_now.value, HolderGone)
    fleet.mark_unreachable(url_of(0), "it refuses connections")
    with pytest.raises(NoWorkerReady, match="it refuses connections") as away:
        choose(fleet, name)
    assert not isinstance(away.value, HolderGone)
    fleet.remove(url_of(0))
    with pytest.raises(HolderGone):
        choose(fleet, name)


def test_a_worker_that_turns_requests_away_is_left_alone_for_its_pause(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.turned_away(url_of(0), 5.0, 0.0)
    with pytest.raises(NoWorkerReady, match="turned a request away"):
        choose(fleet, response_id(UNIQUE, url_of(0)))


def test_nobody_is_gone_from_a_fleet_that_knows_no_worker_yet(make_fleet: MakeFleet) -> None:
    with pytest.raises(NoWorkerReady) as error:
        choose(make_fleet(0), "resp_mine")
    assert not isinstance(error.value, HolderGone)
