"""Who sends a request and how urgent it is, as its headers state it (`router.server.affinity.with_headers`).

Not covered: sessions and lengths of answers (tests/router/core/test_sessions.py, test_decode_cost.py).
"""

from __future__ import annotations

import pytest

from router.core.decision import ANYONE, Caller, RouteRequest
from router.server.affinity import MAX_NAME, Callers, with_headers

ROUTE = RouteRequest(None, None, streaming=True)
OBJECTIVES = {"chat": 10, "batch": -5}


@pytest.mark.parametrize(
    ("headers", "caller"),
    [
        pytest.param([], ANYONE, id="nothing stated"),
        pytest.param([(b"x-priority", b"7")], Caller(priority=7), id="a priority"),
        pytest.param([(b"x-priority", b"-7")], Caller(priority=-7), id="a negative priority"),
        pytest.param([(b"x-priority", b"high")], ANYONE, id="a priority that is no number"),
        pytest.param([(b"x-priority", b"1234567890")], ANYONE, id="a priority of too many digits"),
        pytest.param([(b"x-priority", "\u0663".encode())], ANYONE, id="digits of another script"),
        pytest.param([(b"x-llm-d-inference-fairness-id", b"a")], Caller("a"), id="llm-d's tenant"),
        pytest.param([(b"x-gateway-inference-fairness-id", b"a")], Caller("a"), id="the older name of the tenant"),
        pytest.param(
            [(b"x-llm-d-inference-fairness-id", b""), (b"x-gateway-inference-fairness-id", b"a")],
            Caller("a"),
            id="an empty header says nothing",
        ),
        pytest.param(
            [(b"x-llm-d-inference-fairness-id", b"a"), (b"x-llm-d-inference-fairness-id", b"b")],
            Caller("a"),
            id="the first of two counts",
        ),
        pytest.param([(b"x-llm-d-inference-objective", b"chat")], Caller("", 10, "chat"), id="an objective"),
        pytest.param([(b"x-gateway-inference-objective", b"batch")], Caller("", -5, "batch"), id="its older name"),
        pytest.param([(b"x-llm-d-inference-objective", b"x")], Caller("", 0, "x"), id="an objective nobody knows"),
        pytest.param(
            [(b"x-llm-d-inference-objective", b"chat"), (b"x-priority", b"1")],
            Caller("", 1, "chat"),
            id="a stated priority is stronger than an objective's",
        ),
        pytest.param([(b"x-llm-d-inference-fairness-id", b"\xff")], Caller("\xff"), id="bytes beyond ASCII"),
    ],
)
def test_headers_state_the_caller(headers: list[tuple[bytes, bytes]], caller: Caller) -> None:
    assert with_headers(ROUTE, headers, Callers(OBJECTIVES)).caller == caller


def test_a_header_of_ones_own_replaces_the_others() -> None:
    own = Callers(tenant_header="x-team")
    theirs = [(b"x-llm-d-inference-fairness-id", b"spoofed")]

    assert with_headers(ROUTE, [*theirs, (b"x-team", b"search")], own).caller == Caller("search", 0, "")
    assert with_headers(ROUTE, theirs, own) is ROUTE


def test_a_name_is_bounded() -> None:
    headers = [(b"x-llm-d-inference-fairness-id", b"t" * 60_000), (b"x-llm-d-inference-objective", b"o" * 60_000)]

    assert with_headers(ROUTE, headers).caller == Caller("t" * MAX_NAME, 0, "o" * MAX_NAME)


def test_a_request_that_states_nothing_stays_the_same_object() -> None:
    assert with_headers(ROUTE, [(b"accept", b"*/*"), (b"x-request-id", b"1")]) is ROUTE
