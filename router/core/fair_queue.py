"""Fairness among the tenants of one priority class: deficit round robin, charged in tokens that have to be computed.

After Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round Robin" (SIGCOMM 1995), with two changes. What
a request costs is known only when it is placed, so a tenant is served while it has credit and may fall below zero by
one request (as in RFC 8290, 4.2). And, as there, a tenant that has just begun and has credit goes before those that
have waited for their turn; but all that have just begun get no more tokens than the others meanwhile, so that callers
who invent names starve nobody.

Turns and credit are a tenant's, however many models, ranks or stored responses its requests name: each combination has
a flow, because its requests can go to other workers, but no turn of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

MAX_IDLE = 1024
"""Tenants without waiting requests whose credit is remembered."""

T = TypeVar("T", bound=Hashable)


class Flow(Generic[T]):
    """The waiting requests of one tenant in one group: they wait for each other in the order of their arrival."""

    __slots__ = ("group", "tenant", "waiting")

    def __init__(self, tenant: Tenant[T], group: Hashable) -> None:
        self.tenant = tenant
        self.group = group
        """Stands for the workers that can take them: requests of one group find room, or none, together."""
        self.waiting: dict[T, int] = {}
        """Each with the number of its arrival, in that order."""

    @property
    def first(self) -> T:
        """The one that has waited longest."""
        return next(iter(self.waiting))

    @property
    def since(self) -> int:
        """The number of its arrival."""
        return next(iter(self.waiting.values()))


class Tenant(Generic[T]):
    """The waiting requests of one tenant."""

    __slots__ = ("credit", "flows", "name", "size")

    def __init__(self, name: str, credit: int) -> None:
        self.name = name
        self.credit = credit
        """Tokens that it may still compute in this round; below zero: what it owes."""
        self.size = 0
        """Bytes of its requests."""
        self.flows: dict[Hashable, Flow[T]] = {}
        """By group."""

    @property
    def newest(self) -> T:
        """The request that arrived last."""
        ends = (next(reversed(flow.waiting.items())) for flow in self.flows.values())
        return max(ends, key=lambda end: end[1])[0]


class _Idle(NamedTuple):
    credit: int
    served: int
    """Tokens that all tenants had been charged when it became idle."""


class FairQueue(Generic[T]):
    """The tenants of one class. Between two that both have requests waiting, and whose requests can be placed, the
    tokens charged differ by at most two quanta and the largest request, from when both have used up their first turn.
    Until then those that have just begun get together what the others get together."""

    def __init__(self, quantum: int) -> None:
        """`quantum`: tokens that each tenant may compute in one round."""
        self._quantum = quantum
        self._tenants: dict[str, Tenant[T]] = {}
        self._new: OrderedDict[str, Tenant[T]] = OrderedDict()
        self._old: OrderedDict[str, Tenant[T]] = OrderedDict()
        self._idle: OrderedDict[str, _Idle] = OrderedDict()
        self._served = 0
        self._arrivals = 0
        self._ahead = 0
        """Tokens by which those that have just begun are ahead of the others: within a quantum, counted so far."""

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def push(self, name: str, group: Hashable, item: T, size: int) -> Flow[T]:
        """A request of `size` bytes waits, behind those of its flow. Returns the flow."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = self._begin(name)
        flow = tenant.flows.get(group)
        if flow is None:
            flow = tenant.flows[group] = Flow(tenant, group)
        self._arrivals += 1
        flow.waiting[item] = self._arrivals
        tenant.size += size
        return flow

    def order(self) -> Iterator[Flow[T]]:
        """The flows in the order of their tenants' turns, those of one tenant by the arrival of their first requests.
        Whoever places a request of one that is not the first lets it overtake the ones before it."""
        if not self._tenants:
            return
        first = self._settle()
        yield from _by_arrival(first)
        for tenants in (self._new, self._old):
            for tenant in tuple(tenants.values()):
                if tenant is not first:
                    yield from _by_arrival(tenant)

    def take(self, flow: Flow[T], size: int, tokens: int) -> T:
        """The first request of the flow, of this size, is placed, and takes `tokens` to compute."""
        item, tenant = flow.first, flow.tenant
        tenant.credit -= tokens
        self._served += tokens
        self._count(tokens if tenant.name in self._new else -tokens)
        self.remove(flow, item, size)
        if tenant.flows and tenant.credit <= 0:
            self._end_turn(tenant)
        return item

    def remove(self, flow: Flow[T], item: T, size: int) -> None:
        """A request leaves the queue."""
        tenant = flow.tenant
        del flow.waiting[item]
        tenant.size -= size
        if not flow.waiting:
            del tenant.flows[flow.group]
            if not tenant.flows:
                self._end(tenant)

    def largest(self) -> Tenant[T]:
        """The tenant that holds most bytes: O(tenants)."""
        return max(self._tenants.values(), key=attrgetter("size"))

    def _begin(self, name: str) -> Tenant[T]:
        credit, known = self._quantum, self._idle.pop(name, None)
        if known is not None:
            rounds = (self._served - known.served) // (self._quantum * max(len(self._tenants), 1))
            credit = min(known.credit + rounds * self._quantum, self._quantum)
        tenant: Tenant[T] = Tenant(name, credit)
        (self._new if credit > 0 else self._old)[name] = tenant
        return tenant

    def _end(self, tenant: Tenant[T]) -> None:
        del self._tenants[tenant.name]
        (self._new if tenant.name in self._new else self._old).pop(tenant.name)
        if not self._tenants:
            self._idle.clear()  # nobody waits: nobody owes anything
            return
        self._idle[tenant.name] = _Idle(tenant.credit, self._served)
        if len(self._idle) > MAX_IDLE:
            self._idle.popitem(last=False)

    def _settle(self) -> Tenant[T]:
        """Give rounds until a tenant has credit, whose turn it is. O(tenants), whatever they owe."""
        new, old = self._new, self._old
        passed = 0
        while True:
            tenants = new if new and (self._ahead <= 0 or not old) else old
            tenant = next(iter(tenants.values()))
            if tenant.credit > 0:
                return tenant
            self._end_turn(tenant)
            self._count(-self._quantum)  # what it owes has taken this turn
            passed += 1
            if passed == len(self._tenants):
                self._skip_rounds()

    def _count(self, ahead: int) -> None:
        self._ahead = max(min(self._ahead + ahead, self._quantum), -self._quantum)

    def _skip_rounds(self) -> None:
        """Give the rounds at once in which nobody would get out of debt."""
        quantum = self._quantum
        rounds = min(-tenant.credit // quantum for tenant in self._tenants.values())
        if rounds > 0:
            for tenant in self._tenants.values():
                tenant.credit += rounds * quantum

    def _end_turn(self, tenant: Tenant[T]) -> None:
        """The tenant has no credit left: it gets that of the next round, and waits for it."""
        tenant.credit += self._quantum
        self._new.pop(tenant.name, None)
        self._old.pop(tenant.name, None)
        self._old[tenant.name] = tenant


def _by_arrival(tenant: Tenant[T]) -> list[Flow[T]]:
    flows = list(tenant.flows.values())
    if len(flows) > 1:
        flows.sort(key=attrgetter("since"))
    return flows
