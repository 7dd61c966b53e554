"""List-then-watch, one step at a time.

Covers: what is asked when, what each answer and each failure changes, how long is waited; and that the objects end as
those of the server, whatever happens on the way. Not covered: connections (test_client.py), the loop around it
(tests/router/discovery/test_shell.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kube.errors import ApiFailureCause, KubeApiError, status_error
from runtime.kube.listwatch import ListWatch, ListWatchPolicy, Watch
from tests.runtime.kube.objects import bookmark, event, item, listing, status

POLICY = ListWatchPolicy()
ONE, TWO = item("a", 1), item("b", 2)


def value(found: Mapping[str, Any]) -> int:
    """What is kept of an object."""
    kept = found["value"]
    if type(kept) is not int:
        raise TypeError(f"no number: {kept!r}")
    return kept


def machine(chance: Callable[[], float] = lambda: 0.5) -> ListWatch[int]:
    return ListWatch(value, chance, POLICY)


def values(state: ListWatch[int]) -> list[int]:
    return [] if state.objects is None else list(state.objects.values())


def listed(*slices: dict[str, Any], version: int = 1) -> ListWatch[int]:
    """One that has listed at time 0 and begun to watch."""
    state = machine()
    state.listed(listing(*slices, version=version), 0.0)
    state.opened(0.0)
    return state


def test_first_the_list_then_a_watch_from_there() -> None:
    state = machine()
    assert state.next(0.0) is None
    assert (state.objects, state.age(0.0), state.healthy(0.0)) == (None, None, False)
    state.listed(listing(ONE, version=7), 0.0)
    assert values(state) == [1]
    assert state.next(1.0) == Watch("7", 12)
    assert state.relists == {}


def test_events_and_bookmarks_carry_the_position_on() -> None:
    state = listed(ONE)
    state.event(event("ADDED", TWO, 2), 1.0)
    assert values(state) == [1, 2]
    assert state.next(1.0) == Watch("2", 12)
    state.event(event("MODIFIED", item("b", 20), 3), 1.0)
    assert values(state) == [1, 20]
    state.event(bookmark(40), 2.0)
    assert state.next(2.0) == Watch("40", 12)
    state.event(event("DELETED", ONE, 41), 3.0)
    assert values(state) == [20]
    assert state.age(4.5) == 1.5


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 10), (0.999, 14)])
def test_watches_end_at_different_times(chance: float, seconds: int) -> None:
    state = machine(lambda: chance)
    state.listed(listing(), 0.0)
    assert state.next(0.0) == Watch("1", seconds)


def test_a_watch_that_ends_in_its_time_goes_on_where_it_stood() -> None:
    state = listed(ONE)
    state.event(bookmark(9), 20.0)
    state.ended(40.0)
    assert state.next(40.0) == Watch("9", 12)
    assert state.age(41.0) == 1.0
    assert state.failures == {}


def test_the_list_is_read_again_every_five_minutes_so_that_a_lost_deletion_heals() -> None:
    state = listed(ONE, TWO)
    assert state.next(329.0) is not None
    assert state.next(330.0) is None  # 300 s and half of the fifth that is left to chance
    state.listed(listing(TWO, version=90), 331.0)
    assert values(state) == [2]
    assert state.relists == {"periodic": 1}
    assert state.next(332.0) == Watch("90", 12)


@pytest.mark.parametrize(
    "gone",
    [
        pytest.param(
            status_error(410, "", status(410, "Expired", "too old resource version: 1 (9)")), id="with a Status"
        ),
        pytest.param(status_error(410, "", None), id="without"),
    ],
)
def test_410_lists_again_at_once_and_keeps_the_objects_meanwhile(gone: KubeApiError) -> None:
    state = listed(ONE)
    assert state.failed(gone, 5.0) == 0.0
    assert state.next(5.0) is None
    assert values(state) == [1]
    state.listed(listing(TWO, version=9), 5.0)
    assert state.relists == {"expired": 1}
    assert state.failures == {}
    state.opened(5.0)
    assert state.failed(gone, 5.0) > 0.0  # again, though the list is new: no hot loop


def test_410_as_an_event_is_the_same() -> None:
    state = listed(ONE)
    with pytest.raises(KubeApiError) as raised:
        state.event({"type": "ERROR", "object": status(410, "Expired")}, 1.0)
    assert raised.value.cause is ApiFailureCause.EXPIRED


def test_another_error_event_is_a_failure() -> None:
    state = listed(ONE)
    with pytest.raises(KubeApiError, match="etcd") as raised:
        state.event({"type": "ERROR", "object": status(500, "", "etcd is away", retryAfterSeconds=3)}, 1.0)
    assert raised.value.cause is ApiFailureCause.ERROR_EVENT
    assert raised.value.retry_after == 3.0


def test_a_cut_watch_is_resumed_and_after_a_second_failure_the_list_is_read_again() -> None:
    state = listed(ONE)
    cut = KubeApiError.of(ApiFailureCause.CUT, "reset")
    assert 0.1 <= state.failed(cut, 1.0) <= 0.2
    assert state.next(1.2) == Watch("1", 12)
    assert 0.2 <= state.failed(KubeApiError.of(ApiFailureCause.CONNECT, "refused"), 1.3) <= 0.4
    assert state.next(1.6) is None
    state.listed(listing(version=5), 1.6)
    assert state.relists == {"failures": 1}
    assert state.failures == {"cut": 1, "connect": 1}


def test_waits_double_up_to_a_cap_and_begin_anew_once_a_watch_has_worked() -> None:
    state = listed(ONE)
    refused = KubeApiError.of(ApiFailureCause.CONNECT, "refused")
    waits = [state.failed(refused, 1.0) for _ in range(40)]
    assert waits[:3] == pytest.approx([0.15, 0.3, 0.6])
    assert max(waits) == pytest.approx(3.75)
    state.listed(listing(ONE), 2.0)
    state.opened(2.0)
    assert state.failed(refused, 2.1) == pytest.approx(3.75)  # a list alone shows nothing: the watch may be forbidden
    state.opened(3.0)
    state.settled()
    assert (state.failure, state.streak) == (None, 0)
    assert state.failed(refused, 6.0) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("code", "header", "body", "cause", "wait"),
    [
        pytest.param(429, "7", status(429), ApiFailureCause.THROTTLED, 7.0, id="429, header"),
        pytest.param(429, "", status(429, retryAfterSeconds=2), ApiFailureCause.THROTTLED, 2.0, id="429, details"),
        pytest.param(503, "3", None, ApiFailureCause.SERVER, 3.0, id="503"),
        pytest.param(
            504, "", status(504, message="Too large resource version"), ApiFailureCause.SERVER, None, id="504"
        ),
        pytest.param(500, "Tue, 24 Nov 2026 23:00:00 GMT", [], ApiFailureCause.SERVER, None, id="500, a date"),
        pytest.param(429, "86400", None, ApiFailureCause.THROTTLED, 60.0, id="429, a day"),
        pytest.param(401, "9", status(401), ApiFailureCause.UNAUTHORIZED, None, id="401"),
        pytest.param(
            403, "", status(403, message="endpointslices is forbidden"), ApiFailureCause.FORBIDDEN, None, id="403"
        ),
        pytest.param(404, "", {"details": "?"}, ApiFailureCause.STATUS, None, id="404"),
        pytest.param(302, "", b"", ApiFailureCause.STATUS, None, id="302"),
    ],
)
def test_statuses(code: int, header: str, body: object, cause: ApiFailureCause, wait: float | None) -> None:
    failure = status_error(code, header, body)
    assert failure.cause is cause
    assert str(code) in str(failure)
    waited = listed(ONE).failed(failure, 0.0)
    if wait is None:
        assert waited <= 0.2
    else:
        assert wait <= waited <= 1.1 * wait


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(None, id="none"),
        pytest.param([], id="a list"),
        pytest.param({}, id="an empty object"),
        pytest.param({"metadata": {}}, id="without a version"),
        pytest.param({"metadata": {"resourceVersion": "1"}}, id="without items"),
        pytest.param("x", id="text"),
        pytest.param(5, id="a number"),
    ],
)
def test_a_list_that_is_none_changes_nothing(found: object) -> None:
    state = listed(ONE)
    with pytest.raises(KubeApiError) as raised:
        state.listed(found, 1.0)
    assert raised.value.cause is ApiFailureCause.MALFORMED
    assert values(state) == [1]


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(None, id="none"),
        pytest.param([], id="a list"),
        pytest.param({}, id="an empty object"),
        pytest.param("x", id="text"),
        pytest.param({"type": "ADDED"}, id="without an object"),
        pytest.param({"type": "ADDED", "object": {}}, id="an empty item"),
        pytest.param({"type": "ERROR", "object": []}, id="an ERROR without Status"),
        pytest.param({"type": "ADDED", "object": {"metadata": {"name": "a"}}}, id="without a version"),
        pytest.param(event("RENAMED", ONE, 9), id="unknown type"),
        pytest.param(event("ADDED", item("b", "x"), 9), id="an unreadable value"),
        pytest.param(event("ADDED", {"metadata": TWO["metadata"]}, 9), id="without a value"),
    ],
)
def test_an_event_that_is_none_changes_nothing(found: object) -> None:
    state = listed(ONE)
    with pytest.raises(KubeApiError):
        state.event(found, 1.0)
    assert values(state) == [1]
    assert state.next(1.0) == Watch("1", 12)


def test_a_watch_that_ends_at_once_is_a_failure() -> None:
    state = listed(ONE)
    with pytest.raises(KubeApiError) as raised:
        state.ended(0.5)
    assert raised.value.cause is ApiFailureCause.CUT


def test_health_is_the_age_of_the_last_confirmation() -> None:
    state = listed(ONE)
    assert state.healthy(60.0)
    assert not state.healthy(60.1)
    assert state.age(61.0) == 61.0
    state.opened(62.0)
    assert state.healthy(62.0)


def test_a_watch_that_died_is_noticed_within_twenty_seconds() -> None:
    assert POLICY.longest_watch + POLICY.slack + POLICY.retry.first < 20


# --- any sequence of events, failures and lists ---------------------------------------------------------


@dataclass
class Server:
    """An API server's store with its history, for a client that misses parts of it."""

    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    compacted: int = 0

    @property
    def version(self) -> int:
        return len(self.log)

    def put(self, made: dict[str, Any]) -> None:
        name = made["metadata"]["name"]
        kind = "MODIFIED" if name in self.items else "ADDED"
        self.items[name] = made
        self.log.append(event(kind, made, self.version + 1))

    def delete(self, name: str) -> None:
        if (made := self.items.pop(name, None)) is not None:
            self.log.append(event("DELETED", made, self.version + 1))

    def list(self) -> dict[str, Any]:
        return listing(*self.items.values(), version=self.version)


NAMES = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), NAMES, st.integers(0, 9)),
        st.tuples(st.just("delete"), NAMES),
        st.tuples(st.just("deliver"), st.integers(1, 4)),
        st.tuples(st.just("bookmark")),
        st.tuples(st.just("fail"), st.sampled_from([*ApiFailureCause])),
        st.tuples(st.just("end")),
        st.tuples(st.just("compact")),
        st.tuples(st.just("wait"), st.floats(0.0, 400.0)),
    ),
    max_size=40,
)


@dataclass
class Client:
    """Does what the shell does, at a server whose answers the test chooses."""

    server: Server
    state: ListWatch[int]
    now: float = 0.0
    position: int | None = None
    """Of the open watch in the server's log; None while none is open."""

    def open(self) -> None:
        """Do what is due until a watch is open."""
        while self.position is None:
            watch = self.state.next(self.now)
            if watch is None:
                self.state.listed(self.server.list(), self.now)
            elif int(watch.version) < self.server.compacted:
                self.fail(status_error(410, "", None))
            else:
                self.state.opened(self.now)
                self.position = int(watch.version)

    def deliver(self, count: int) -> None:
        self.open()
        assert self.position is not None
        for found in self.server.log[self.position : self.position + count]:
            self.state.event(found, self.now)
            self.position += 1

    def fail(self, failure: KubeApiError) -> None:
        self.position = None
        self.now += self.state.failed(failure, self.now)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_the_objects_are_those_of_the_server_in_the_end(steps: list[tuple[Any, ...]], seed: int) -> None:
    server = Server()
    client = Client(server, ListWatch(value, random.Random(seed).random, POLICY))
    known = False
    for step, *arguments in steps:
        match step:
            case "put":
                server.put(item(arguments[0], arguments[1]))
            case "delete":
                server.delete(arguments[0])
            case "deliver":
                client.deliver(arguments[0])
            case "bookmark":
                client.open()
                if client.position == server.version:
                    client.state.event(bookmark(server.version), client.now)
            case "fail":
                client.fail(KubeApiError.of(arguments[0], "a test"))
            case "end":
                client.open()
                client.now += 40.0
                client.state.ended(client.now)
                client.position = None
            case "compact":
                server.compacted = server.version
            case "wait":
                client.now += arguments[0]
        known = known or client.state.objects is not None
        assert known == (client.state.objects is not None), "what is known is never forgotten"
    client.deliver(len(server.log))
    assert client.state.objects == {("ns", name): made["value"] for name, made in server.items.items()}
