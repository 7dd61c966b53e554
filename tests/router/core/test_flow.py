"""Flow control without time or sockets: which request goes next, who is shed, and what is never lost
(`router.core.flow`, `router.core.fair_queue`).

Not covered: whether a worker has room (test_placement.py), the event loop (tests/router/test_admission.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.decision import Caller, RouteRequest, StoredResponse
from router.core.fair_queue import FairQueue
from router.core.flow import (
    MAX_FULL,
    MAX_TRIES,
    FlowClass,
    FlowControl,
    FlowPolicy,
    Place,
    ShedReason,
    Verdict,
    Waiting,
    WaitState,
    check_classes,
    parse_class,
)

POLICY = FlowPolicy(
    (FlowClass("high", 1, 10.0, 1000), FlowClass("low", 0, 5.0, 1000)), max_bytes=1500, quantum=100, overtaken=1.0
)


HOLDING = replace(POLICY, hold=20.0)


class Bench:
    """A flow control, and what became of the requests that it was given."""

    def __init__(self, policy: FlowPolicy = POLICY) -> None:
        self.flow = FlowControl(policy)
        self.ends: dict[Waiting, ShedReason | None] = {}
        self.put: list[Waiting] = []

    def ask(
        self,
        tenant: str = "",
        priority: int = 0,
        size: int = 100,
        now: float = 0.0,
        model: str = "m",
        state: WaitState = WaitState.WAITING,
        stored: StoredResponse | None = None,
    ) -> Waiting:
        def end(reason: ShedReason | None) -> None:
            assert waiting not in self.ends, "a request ends once"
            self.ends[waiting] = reason

        route = RouteRequest(None, 1, streaming=True, model=model, caller=Caller(tenant, priority), stored=stored)
        waiting = Waiting(route, size, now, end, state=state)
        self.put.append(waiting)
        self.flow.put(waiting)
        return waiting

    def expire(self, now: float, *, absent: bool = False) -> None:
        self.flow.expire(now, lambda: absent)

    def serve(self, count: int, tokens: int = 100) -> list[str]:
        """The tenants of the next requests, each of which takes so many tokens."""
        served = []
        for _ in range(count):
            placed = self.flow.next(0.0, lambda waiting, anywhere: Place(Verdict.PLACED, tokens))
            assert placed is not None
            served.append(placed.route.caller.tenant)
        return served


def test_a_more_urgent_class_goes_first_and_a_tenant_is_served_in_order() -> None:
    bench = Bench()
    low = [bench.ask("a", 0), bench.ask("a", -3)]
    high = [bench.ask("a", 1), bench.ask("b", 7)]

    order = [bench.flow.next(0.0, lambda *_: Place(Verdict.PLACED, 1)) for _ in range(4)]

    assert order == [*high, *low]
    assert bench.flow.next(0.0, lambda *_: Place(Verdict.PLACED, 1)) is None


def test_a_tenant_that_asks_once_goes_next_in_anothers_burst() -> None:
    bench = Bench()
    for _ in range(8):
        bench.ask("burst")
    bench.serve(2)
    bench.ask("interactive", size=10)

    assert bench.serve(1, tokens=10) == ["interactive"]


def test_tenants_that_wait_share_tokens_not_requests() -> None:
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9, quantum=100))
    tokens = {"long": 300, "short": 60}
    served = dict.fromkeys(tokens, 0)
    for _ in range(400):
        bench.ask("long")
        bench.ask("short")
    for _ in range(300):
        placed = bench.flow.next(0.0, lambda waiting, _: Place(Verdict.PLACED, tokens[waiting.route.caller.tenant]))
        assert placed is not None
        served[placed.route.caller.tenant] += tokens[placed.route.caller.tenant]
        assert abs(served["long"] - served["short"]) <= 2 * 100 + 300


def test_names_that_are_made_up_starve_nobody() -> None:
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9, quantum=100))
    for _ in range(20):
        bench.ask("honest")
    served = []
    for number in range(40):
        bench.ask(f"invented-{number}")
        served += bench.serve(1)

    assert served.count("honest") >= 19


def test_a_tenant_that_names_many_models_gets_no_more_than_one_that_names_one() -> None:
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9, quantum=100))
    for number in range(200):
        bench.ask("many", model=f"m{number % 40}")
        bench.ask("one")
    served = bench.serve(100)
    assert abs(served.count("many") - served.count("one")) <= 2

    for number in range(20):
        bench.ask("many", model=f"new-{number}")
    assert bench.serve(40).count("one") >= 18, "nor is it new for each of them"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("mno")), min_size=1, max_size=8),
    st.lists(st.integers(1, 350), min_size=10, max_size=60),
)
@settings(max_examples=40)
def test_tenants_that_wait_differ_by_two_quanta_and_a_request(asked: list[tuple[str, str]], tokens: list[int]) -> None:
    """Whatever the models that they name, and whatever their requests take."""
    quantum = 100
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9, quantum=quantum))
    for tenant, model in asked * (len(tokens) + 20):
        bench.ask(tenant, size=1, model=model)
    served = dict.fromkeys([tenant for tenant, _ in asked], 0)
    while min(served.values()) < quantum:
        (tenant,) = bench.serve(1, 50)
        served[tenant] += 50
    served = dict.fromkeys(served, 0)
    for each in tokens:
        (tenant,) = bench.serve(1, each)
        served[tenant] += each
        assert max(served.values()) - min(served.values()) <= 2 * quantum + max(tokens)


def test_one_that_begins_with_what_costs_little_waits_for_no_other_at_each_request() -> None:
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9, quantum=100))
    for _ in range(40):
        bench.ask("large")
    bench.serve(3, tokens=100)
    for _ in range(40):
        bench.ask("cached")
    served = []
    for _ in range(30):
        placed = bench.flow.next(
            0.0, lambda waiting, _: Place(Verdict.PLACED, 2 if waiting.route.caller.tenant == "cached" else 100)
        )
        assert placed is not None
        served.append(placed.route.caller.tenant)
    assert served.count("large") <= 1


def test_a_tenant_is_served_in_the_order_of_arrival_whatever_the_model() -> None:
    bench = Bench()
    asked = [bench.ask("a", size=10, model=model) for model in "mnmnnmo"]
    assert [bench.flow.next(0.0, lambda *_: Place(Verdict.PLACED, 1)) for _ in asked] == asked


def test_what_is_shed_is_the_newest_whatever_the_model() -> None:
    bench = Bench(replace(POLICY, max_requests=4))
    asked = [bench.ask("a", size=10, model=model) for model in "nmmnm"]
    assert bench.ends == {asked[-1]: ShedReason.SATURATED}
    bench.ask("b", size=1)
    assert bench.ends == dict.fromkeys([asked[-1], asked[-2]], ShedReason.SATURATED)


def test_what_everybody_owes_is_no_loop() -> None:
    """Rounds in which nobody gets out of debt are given at once: a loop over these would not end."""
    queue: FairQueue[str] = FairQueue(1)
    flows = {name: queue.push(name, "", f"{name}0", 1) for name in "abc"}
    for name in flows:
        queue.push(name, "", f"{name}1", 1)
    for name, tokens in (("a", 10**15 + 2), ("b", 10**15), ("c", 10**15 + 1)):
        queue.take(flows[name], 1, tokens)
    order = []
    for _ in range(3):
        first = next(queue.order())
        order.append(queue.take(first, 1, 10))
    assert order == ["b1", "c1", "a1"], "who owes least is out of debt first"


def test_what_is_skipped_is_what_rounds_would_have_given() -> None:
    quantum, debts = 7, {"a": 50, "b": 41, "c": 43, "d": 49}
    queue: FairQueue[str] = FairQueue(quantum)
    flows = {name: queue.push(name, "", name + "0", 1) for name in debts}
    for name, flow in flows.items():
        queue.push(name, "", name + "1", 1)
        queue.take(flow, 1, debts[name])
    credit = {name: 2 * quantum - debt for name, debt in debts.items()}
    ring = list(debts)
    while credit[ring[0]] <= 0:
        credit[ring[0]] += quantum
        ring = [*ring[1:], ring[0]]
    assert next(queue.order()).tenant.name == ring[0]


def test_what_finds_no_room_sheds_the_least_urgent_and_then_the_newest_of_the_largest_tenant() -> None:
    bench = Bench()
    burst = [bench.ask("burst", 0) for _ in range(9)]
    modest = bench.ask("modest", 0)
    more = bench.ask("modest", 0)
    assert bench.ends == {burst[-1]: ShedReason.SATURATED}, "the class is full"

    urgent = [bench.ask("x", 1) for _ in range(6)]

    assert {each for each, reason in bench.ends.items() if reason is ShedReason.SATURATED} == {burst[-1], burst[-2]}
    assert all(each.state is WaitState.WAITING for each in (modest, more, *urgent))


def test_a_request_larger_than_all_room_is_itself_shed() -> None:
    bench = Bench()
    others = [bench.ask("a", 1, 900), bench.ask("b", 0, 100)]
    huge = bench.ask("c", 0, 1001)

    assert bench.ends == {huge: ShedReason.SATURATED}
    assert all(each.state is WaitState.WAITING for each in others)


def test_time_to_wait_is_over_by_class() -> None:
    bench = Bench()
    high, low = bench.ask(priority=1, now=0.0), bench.ask(priority=0, now=0.0)
    later = bench.ask(priority=0, now=4.0)
    assert bench.flow.wake_at(0.0) == 5.0

    bench.expire(5.0)
    assert bench.ends == {low: ShedReason.EXPIRED}
    assert bench.flow.wake_at(5.0) == 9.0
    bench.expire(10.0)
    assert bench.ends == {low: ShedReason.EXPIRED, later: ShedReason.EXPIRED, high: ShedReason.EXPIRED}
    assert bench.flow.wake_at(10.0) == math.inf


def test_what_is_held_waits_for_as_long_as_a_worker_may_take_to_start() -> None:
    bench = Bench(HOLDING)
    held, waiting = bench.ask(state=WaitState.HELD), bench.ask(now=1.0)
    assert bench.flow.wake_at(1.0) == 6.0

    bench.expire(6.0, absent=True)
    assert (held.state, waiting.state, bench.ends) == (WaitState.HELD, WaitState.HELD, {}), "the last worker has left"
    assert bench.flow.wake_at(6.0) == 20.0
    assert bench.flow.classes[1].oldest is held
    bench.expire(20.0, absent=True)
    assert bench.ends == {held: ShedReason.EXPIRED}
    bench.expire(25.9)
    assert bench.serve(1) == [""]
    assert waiting.state is WaitState.PLACED


def test_without_a_time_to_hold_requests_none_is_held() -> None:
    bench = Bench()
    waiting = bench.ask()
    bench.expire(5.0, absent=True)
    assert bench.ends == {waiting: ShedReason.EXPIRED}


def test_no_more_wait_than_may() -> None:
    bench = Bench(replace(POLICY, max_requests=2))
    first, batch, urgent = bench.ask("a"), bench.ask("a", -1), bench.ask("b", 1)
    assert bench.ends == {batch: ShedReason.SATURATED}
    assert first.waits
    assert urgent.waits


def test_a_request_whose_worker_is_busy_is_overtaken_but_not_for_long() -> None:
    bench = Bench()
    first = bench.ask("a")
    others = [bench.ask("b"), bench.ask("c")]

    def place(waiting: Waiting, anywhere: bool) -> Place:
        if waiting is first and not anywhere:
            return Place(Verdict.PREFERS_FULL)
        return Place(Verdict.PLACED, 1)

    assert bench.flow.next(3.0, place) is others[0]
    assert bench.flow.wake_at(3.0) == 4.0
    assert bench.flow.next(3.5, place) is others[1]
    assert bench.flow.next(3.9, place) is None
    assert bench.flow.next(4.0, place) is first


def test_models_whose_workers_are_full_do_not_hold_up_others() -> None:
    bench = Bench()
    bench.ask("a", priority=1, model="full")
    bench.ask("b", priority=1, model="full")
    free = bench.ask("a", priority=0, model="free")
    tried = []

    def place(waiting: Waiting, anywhere: bool) -> Place:
        tried.append(waiting)
        return Place(Verdict.FULL) if waiting.route.model == "full" else Place(Verdict.PLACED, 1)

    assert bench.flow.next(0.0, place) is free
    assert len(tried) == 2, "one request speaks for its model"


def test_the_search_for_a_place_is_bounded() -> None:
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9))
    first = bench.ask("t0")
    for number in range(100):
        bench.ask(f"t{number + 1}")
    tried = 0

    def place(waiting: Waiting, anywhere: bool) -> Place:
        nonlocal tried
        tried += 1
        return Place(Verdict.PLACED, 1) if anywhere else Place(Verdict.PREFERS_FULL)

    assert bench.flow.next(0.0, place) is first
    assert tried == MAX_TRIES + 1


def test_a_search_among_many_groups_is_bounded_and_goes_on_where_it_was_put_off() -> None:
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9))
    groups = 5 * MAX_FULL
    for number in range(groups):
        bench.ask("a", model=f"m{number}")
    last = bench.ask("z", model="free")
    asked: list[str | None] = []

    def place(waiting: Waiting, anywhere: bool) -> Place:
        asked.append(waiting.route.model)
        if waiting is last:
            return Place(Verdict.PLACED, 1)
        return Place(Verdict.FULL, room_in=50.0 if waiting.route.model == "m3" else 90.0)

    looks = 0
    while last.waits:
        before = len(asked)
        bench.flow.next(1.0, place)
        looks += 1
        assert len(asked) - before <= MAX_FULL + 1
        if last.waits:
            assert bench.flow.room_at == 1.0, "it goes on at once"
    assert looks <= groups / MAX_FULL + 1
    assert len(asked) == len({*asked}), "nobody is asked twice meanwhile"

    while bench.flow.room_at <= 1.0 or bench.flow.room_at == math.inf:
        assert bench.flow.next(1.0, place) is None
    assert bench.flow.room_at == 51.0, "that of the first to have room, wherever it was asked"


def test_those_behind_a_search_that_was_put_off_do_not_go_first_for_ever() -> None:
    bench = Bench(FlowPolicy((FlowClass("only", 0, 10.0, 10**9),), max_bytes=10**9))
    first = bench.ask("a", model="first")
    for number in range(2 * MAX_FULL):
        bench.ask("a", model=f"m{number}")
    full = {f"m{number}" for number in range(2 * MAX_FULL)} | {"first"}

    def place(waiting: Waiting, anywhere: bool) -> Place:
        return Place(Verdict.FULL) if waiting.route.model in full else Place(Verdict.PLACED, 1)

    assert bench.flow.next(0.0, place) is None
    full.discard("first")
    for _ in range(MAX_FULL + 3):
        bench.ask("z", model="free")
        bench.flow.next(0.0, place)
    assert first.state is WaitState.PLACED


def test_responses_of_one_worker_wait_together() -> None:
    bench = Bench()
    for number in range(10):
        bench.ask("a", stored=StoredResponse(f"resp_{number}", "0123456789ab"), size=10)
    bench.ask("a", stored=StoredResponse("resp_x", None), size=10)
    asked = []

    def place(waiting: Waiting, anywhere: bool) -> Place:
        asked.append(waiting)
        return Place(Verdict.FULL)

    assert bench.flow.next(0.0, place) is None
    assert len(asked) == 2


@pytest.mark.parametrize(
    "text",
    ["", "a", "a=", "=1", "A=1", "a=1.5", "a=1:", "a=1:0", "a=1:5:0", "a=1:-5", "a=1:5:6:7", "a b=1", "a=1:nan"],
)
def test_what_describes_no_class_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"class"):
        parse_class(text)


def test_classes_are_told_apart() -> None:
    assert parse_class("batch=-10:2.5:64") == FlowClass("batch", -10, 2.5, 64 * 2**20)
    for texts in ([], ["a=1", "a=2"], ["a=1", "b=1"], [f"c{n}={n}" for n in range(17)]):
        with pytest.raises(ValueError, match="class"):
            check_classes([parse_class(text) for text in texts])


class Flows(RuleBasedStateMachine):
    """Any order of requests, rooms, time-outs and clients that leave."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(HOLDING)
        self.now = 0.0

    @rule(
        tenant=st.sampled_from("abc"),
        priority=st.integers(-2, 2),
        size=st.integers(1, 700),
        model=st.sampled_from(["m", "n"]),
        state=st.sampled_from([WaitState.WAITING, WaitState.HELD]),
    )
    def ask(self, tenant: str, priority: int, size: int, model: str, state: WaitState) -> None:
        self.bench.ask(tenant, priority, size, self.now, model, state)

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]), absent=st.booleans())
    def time_passes(self, seconds: float, absent: bool) -> None:
        self.now += seconds
        self.bench.expire(self.now, absent=absent)
        for waiting in self.waiting():
            longest = {WaitState.WAITING: waiting.queue.policy.ttl, WaitState.HELD: HOLDING.hold}[waiting.state]
            assert self.now - waiting.since < longest
            assert self.now >= waiting.since >= waiting.arrived
        if self.waiting():
            assert self.now < self.bench.flow.wake_at(self.now) < math.inf

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        self.bench.flow.remove(data.draw(st.sampled_from(self.waiting())))

    @rule(
        full=st.sets(st.sampled_from(["m", "n"])), tokens=st.integers(1, 500), prefers=st.sets(st.sampled_from("abc"))
    )
    def room(self, full: set[str], tokens: int, prefers: set[str]) -> None:
        def place(waiting: Waiting, anywhere: bool) -> Place:
            if waiting.route.model in full:
                return Place(Verdict.FULL)
            if waiting.route.caller.tenant in prefers and not anywhere:
                return Place(Verdict.PREFERS_FULL)
            return Place(Verdict.PLACED, tokens)

        before = self.waiting()
        placed = self.bench.flow.next(self.now, place)
        able = [each for each in before if each.route.model not in full and each.route.caller.tenant not in prefers]
        if placed is None:
            assert not able
            return
        assert placed.route.model not in full
        urgent = max((each.queue.policy.priority for each in able), default=-math.inf)
        assert placed.queue.policy.priority >= urgent
        for earlier in before[: before.index(placed)]:
            assert earlier.flow is not placed.flow, "first in, first out within a flow"

    @invariant()
    def nothing_is_lost_and_bounds_hold(self) -> None:
        flow = self.bench.flow
        waiting = self.waiting()
        assert flow.waiting == len(waiting)
        assert flow.size == sum(each.size for each in waiting) <= POLICY.max_bytes
        for queue in flow.classes:
            of_class = [each for each in waiting if each.queue is queue]
            assert {each for waits in queue.waits.values() for each in waits} == {*of_class}
            assert (queue.waiting, queue.oldest is None) == (len(of_class), not of_class)
            assert queue.size == sum(each.size for each in of_class) <= queue.policy.max_bytes
        for each in self.bench.put:
            assert (each in self.bench.ends) == (each.state in (WaitState.PLACED, WaitState.SHED))
            if each in self.bench.ends:
                assert (self.bench.ends[each] is None) == (each.state is WaitState.PLACED)

    def waiting(self) -> list[Waiting]:
        return [each for each in self.bench.put if each.waits]


TestFlows = Flows.TestCase
TestFlows.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
