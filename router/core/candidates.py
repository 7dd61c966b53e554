"""Which workers a request may be sent to, by their states. `docs/routing.md` says the same in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from router.core.worker import Member
from router.core.worker_state import State


def candidates(members: Iterable[Member], exclude: Collection[str] = ()) -> list[Member]:
    """The members that a request not yet sent to any of `exclude` (URLs) may go to, in the order given.

    The best there are: those that serve; else those that drain; else, when none serves at all, those that are paused;
    else those that are ejected. A request that failed at every worker that serves is not sent to one that asked for a
    pause or is ejected: they are left out for a reason.
    """
    serving: list[Member] = []
    draining: list[Member] = []
    paused: list[Member] = []
    ejected: list[Member] = []
    for member in members:
        match member.state:
            case State.SERVING:
                serving.append(member)
            case State.HALF_OPEN:
                (ejected if member.work.ledger.in_flight else serving).append(member)
            case State.DRAINING:
                draining.append(member)
            case State.PAUSED:
                paused.append(member)
            case State.EJECTED:
                ejected.append(member)
    last_resort = () if serving else (paused, ejected)
    for tier in (serving, draining, *last_resort):
        left = [member for member in tier if member.url not in exclude] if exclude else tier
        if left:
            return left
    return []
