"""Sessions break ties of the cost and change no other decision; what is remembered of them is bounded and ages.

Covered: `SessionTable`, the strategy's tie-break, what bodies and headers state. Not covered: the rest of the cost
(test_decisions.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.keys import PrefixKeys
from kvcache.ranks import rank_url
from router.core.decision import Candidate, RouteRequest
from router.core.fleet import Fleet
from router.core.sessions import Session, SessionTable, session_of
from router.core.strategies import Conditions, cache_aware
from router.server.affinity import affine, with_headers
from tests.router.core.support import MakeFleet, ask, hold, info, send, snapshot, tokens, url_of

SESSION = session_of("session", "s", "m")
HINT = session_of("user", "s", "m", hint=True)


def told(session: Session | None = SESSION, prompt: int = 0) -> RouteRequest:
    return dataclasses.replace(ask(tokens(4, start=prompt)), session=session)


def turns(fleet: Fleet, request: RouteRequest, count: int) -> list[str]:
    """Where each of these requests went; each is over before the next."""
    urls = []
    for _ in range(count):
        decision, ticket = send(fleet, request, 0.0)
        ticket.release(0.0, reused=False)
        urls.append(decision.url)
    return urls


@pytest.mark.parametrize("session", [pytest.param(SESSION, id="session"), pytest.param(HINT, id="hint")])
def test_a_session_stays_where_workers_cost_the_same(make_fleet: MakeFleet, session: Session) -> None:
    unread = dataclasses.replace(told(session), keys=None)
    assert len(set(turns(make_fleet(4), unread, 8))) == 1
    assert len(set(turns(make_fleet(4), dataclasses.replace(unread, session=None), 8))) == 4


def test_a_session_stays_at_a_rank(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(0)
    for rank in range(4):
        url = rank_url("http://w:8000", rank)
        fleet.add(url)
        fleet.apply_snapshot(url, snapshot(info(f"w-{rank}", rank=rank, ranks=4)), 0.0)
    assert len(set(turns(fleet, dataclasses.replace(told(None), keys=None), 8))) == 4
    assert len(set(turns(fleet, dataclasses.replace(told(), keys=None), 8))) == 1


def test_a_longer_match_and_a_smaller_cost_come_first(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    assert set(turns(fleet, told(prompt=5000), 3)) == {url_of(0)}
    hold(fleet, 2, tokens(4), 4)
    assert turns(fleet, told(), 1) == [url_of(2)]  # and the session has moved there
    hold(fleet, 2, [], 0, seq=2)
    assert turns(fleet, told(), 1) == [url_of(2)]


def test_a_hint_keeps_requests_together_only_while_nobody_waits_for_it(make_fleet: MakeFleet) -> None:
    for session, same in ((SESSION, True), (HINT, False)):
        fleet = make_fleet(2)
        first, ticket = send(fleet, told(session), 0.0)
        ticket.first_token(0.0)  # it decodes: half a step, which is a tie
        second, _ = send(fleet, told(session, prompt=9000), 0.0)
        assert (second.url == first.url) is same


figures = st.fixed_dictionaries(
    {
        "cost": st.sampled_from([0.0, 0.001, 0.002, 0.05, 1.0]),
        "matched_blocks": st.integers(0, 2),
        "assigned_seconds": st.sampled_from([0.0, 0.5, 1.0]),
        "in_flight": st.integers(0, 2),
    }
)


@settings(max_examples=80)
@given(st.lists(figures, min_size=2, max_size=5), st.integers(0, 5), st.booleans(), st.sampled_from([0.0, 0.0015, 0.1]))
def test_a_session_changes_no_decision_that_is_not_a_tie(
    workers: list[dict[str, Any]], last: int, hint: bool, tie: float
) -> None:
    candidates = [
        Candidate(
            worker_id=str(number),
            url=str(number),
            loaded_blocks={},
            queue_seconds=0.0,
            load_seconds=0.0,
            memory_seconds=0.0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
            slowdown_seconds=0.0,
            charge_seconds=0.0,
            active_blocks=0,
            turn=number,
            **worker,
        )
        for number, worker in enumerate(workers)
    ]
    without = cache_aware(candidates, Conditions(matchable=True, tie_seconds=tie))
    chosen = cache_aware(
        candidates, Conditions(matchable=True, tie_seconds=tie, session_url=str(last), session_hint=hint)
    )
    smallest = min(candidate.cost for candidate in candidates)
    assert chosen.cost <= smallest + tie
    if chosen != without:
        assert chosen.url == str(last)
        assert abs(chosen.cost - without.cost) <= tie
        assert chosen.matched_blocks == without.matched_blocks


@settings(max_examples=60)
@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0, 6), st.floats(0, 8, allow_nan=False)), max_size=40),
)
def test_the_table_is_the_latest_sessions_that_were_active_lately(limit: int, events: list[tuple[int, float]]) -> None:
    ttl, now = 10.0, 0.0
    table = SessionTable(ttl, limit)
    model: dict[int, tuple[str, float]] = {}
    for name, pause in events:
        now += pause
        table.note(session_of("session", str(name), None), f"w{now}", now)
        model.pop(name, None)
        model[name] = (f"w{now}", now)
        while len(model) > limit:
            del model[next(iter(model))]
        for other in range(7):
            found = model.get(other)
            wanted = found[0] if found is not None and now - found[1] <= ttl else None
            assert table.find(session_of("session", str(other), None), now) == wanted
        assert len(table) <= limit
    table.expire(now + ttl + 1)
    assert len(table) == 0


def test_no_time_to_live_remembers_nothing() -> None:
    table = SessionTable(0.0, 100)
    table.note(SESSION, "w", 0.0)
    assert (len(table), table.find(SESSION, 0.0)) == (0, None)


PLAIN = RouteRequest(PrefixKeys(b"", 4), 0, streaming=False, model="m")


@pytest.mark.parametrize(
    ("body", "session"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"session_id": "s", "user": "u"}, SESSION, id="session_id"),
        pytest.param({"vllm_xargs": {"session_id": "s"}}, SESSION, id="vllm_xargs"),
        pytest.param({"user": "s"}, HINT, id="user"),
        pytest.param({"metadata": {"user_id": "s"}}, HINT, id="metadata of the Messages API"),
        pytest.param({"prompt_cache_key": "k", "user": "s"}, session_of("prompt_cache_key", "k", "m", hint=True),
                     id="prompt_cache_key comes before user"),
        pytest.param({"session_id": 7, "user": ["s"], "metadata": "x", "vllm_xargs": [1]}, None, id="wrong types"),
        pytest.param({"session_id": "", "user": "\ud800"}, session_of("user", "\ud800", "m", hint=True),
                     id="empty, and a lone surrogate"),
    ],
)  # fmt: skip
def test_what_a_body_states(body: dict[str, Any], session: Session | None) -> None:
    assert affine(PLAIN, "/v1/chat/completions", body).session == session


def test_a_header_is_stronger_than_the_body() -> None:
    route = affine(PLAIN, "/v1/completions", {"session_id": "other"})
    for name in (b"x-session-id", b"x-dynamo-session-id"):
        assert with_headers(route, [(b"a", b"b"), (name, b"s")]).session == SESSION
    assert with_headers(route, [(b"x-session-id", b"")]).session == route.session


def test_sessions_of_two_models_are_two() -> None:
    assert session_of("session", "s", "m") != session_of("session", "s", "n")
