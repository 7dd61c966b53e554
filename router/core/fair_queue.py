"""Fairness among the tenants of one priority class: deficit round robin, charged in tokens that have to be computed.

After Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round Robin" (SIGCOMM 1995), with two changes. What
a request costs is known only when it is placed, so a flow is served while it has credit and may fall below zero by one
request (as in RFC 8290, 4.2). And, as there, a flow that has just begun and has credit goes before those that have
waited for their turn; but every other time only, so that callers who invent names starve nobody.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

MAX_IDLE = 1024
"""Flows without waiting requests whose credit is remembered."""

T = TypeVar("T")


class FlowKey(NamedTuple):
    """Requests with the same key wait for each other in the order of their arrival."""

    tenant: str
    group: object
    """Stands for the workers that can take them: requests of one group find room, or none, together."""


class Flow(Generic[T]):
    """The waiting requests of one tenant in one group."""

    __slots__ = ("credit", "key", "size", "waiting")

    def __init__(self, key: FlowKey, credit: int) -> None:
        self.key = key
        self.credit = credit
        """Tokens that it may still compute in this round; below zero: what it owes."""
        self.size = 0
        """Bytes of its requests."""
        self.waiting: deque[T] = deque()


class _Idle(NamedTuple):
    credit: int
    served: int
    """Tokens that all flows had been charged when it became idle."""


class FairQueue(Generic[T]):
    """The flows of one class. Between two flows that both have requests waiting, and whose requests can be placed, the
    tokens charged differ by at most two quanta and the largest request, from when both began to wait."""

    def __init__(self, quantum: int) -> None:
        """`quantum`: tokens that each flow may compute in one round."""
        self._quantum = quantum
        self._flows: dict[FlowKey, Flow[T]] = {}
        self._new: OrderedDict[FlowKey, Flow[T]] = OrderedDict()
        self._old: OrderedDict[FlowKey, Flow[T]] = OrderedDict()
        self._idle: OrderedDict[FlowKey, _Idle] = OrderedDict()
        self._served = 0
        self._new_first = True

    def __bool__(self) -> bool:
        return bool(self._flows)

    def push(self, key: FlowKey, item: T, size: int) -> Flow[T]:
        """A request of `size` bytes waits, behind those of its flow. Returns the flow."""
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = self._begin(key)
        flow.waiting.append(item)
        flow.size += size
        return flow

    def order(self) -> Iterator[Flow[T]]:
        """The flows in the order of their turns. Whoever places a request of one that is not the first lets it overtake
        the ones before it."""
        if not self._flows:
            return
        first = self._settle()
        yield first
        for flows in (self._new, self._old):
            for flow in tuple(flows.values()):
                if flow is not first:
                    yield flow

    def take(self, flow: Flow[T], size: int, tokens: int) -> T:
        """The first request of the flow, of this size, is placed, and takes `tokens` to compute."""
        item = flow.waiting.popleft()
        flow.size -= size
        flow.credit -= tokens
        self._served += tokens
        self._new_first = flow.key not in self._new
        if not flow.waiting:
            self._end(flow)
        elif flow.credit <= 0:
            self._end_turn(flow)
        return item

    def remove(self, flow: Flow[T], item: T, size: int) -> None:
        """A request leaves without having been placed: O(requests of its flow)."""
        flow.waiting.remove(item)
        flow.size -= size
        if not flow.waiting:
            self._end(flow)

    def largest(self) -> Flow[T]:
        """The flow that holds most bytes: O(flows)."""
        return max(self._flows.values(), key=lambda flow: flow.size)

    def _begin(self, key: FlowKey) -> Flow[T]:
        credit, known = self._quantum, self._idle.pop(key, None)
        if known is not None:
            rounds = (self._served - known.served) // (self._quantum * max(len(self._flows), 1))
            credit = min(known.credit + rounds * self._quantum, self._quantum)
        flow: Flow[T] = Flow(key, credit)
        (self._new if credit > 0 else self._old)[key] = flow
        return flow

    def _end(self, flow: Flow[T]) -> None:
        del self._flows[flow.key]
        (self._new if flow.key in self._new else self._old).pop(flow.key)
        if not self._flows:
            self._idle.clear()  # nobody waits: nobody owes anything
            return
        self._idle[flow.key] = _Idle(flow.credit, self._served)
        if len(self._idle) > MAX_IDLE:
            self._idle.popitem(last=False)

    def _settle(self) -> Flow[T]:
        """Give rounds until a flow has credit, whose turn it is."""
        new, old = self._new, self._old
        while True:
            flows = new if new and (self._new_first or not old) else old
            flow = next(iter(flows.values()))
            if flow.credit > 0:
                return flow
            self._end_turn(flow)
            self._new_first = True  # what it owes has taken this turn

    def _end_turn(self, flow: Flow[T]) -> None:
        """The flow has no credit left: it gets that of the next round, and waits for it."""
        flow.credit += self._quantum
        self._new.pop(flow.key, None)
        self._old.pop(flow.key, None)
        self._old[flow.key] = flow
