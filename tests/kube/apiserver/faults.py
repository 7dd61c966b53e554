"""Failures on order: answers with errors, delays, cut watches.

What a client sees of them is what it sees of an overloaded server or a broken network (`test_apiserver.py`); a server
that is away is `FakeApiServer.stop`, a network that goes dead without a word is `tests/kube/relay.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.kube.apiserver.errors import REASONS, ApiError
from tests.kube.apiserver.rbac import Attributes


@dataclass
class Fault:
    """One kind of failure. Empty strings match anything; `times` counts down, None never ends."""

    verb: str = ""
    resource: str = ""
    """Plural, or plural/subresource."""
    namespace: str = ""
    name: str = ""
    user: str = ""
    status: int = 0
    """0 does not fail; the request is only delayed."""
    message: str = ""
    retry_after: int | None = None
    delay: float = 0.0
    until: asyncio.Event | None = None
    """What matching requests wait for, before they are delayed."""
    probability: float = 1.0
    """By a seeded generator: the same requests fail each run."""
    times: int | None = None
    hits: int = 0

    def applies(self, asked: Attributes, user: str) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        wanted = (
            (self.verb, asked.verb), (self.resource, asked.full), (self.namespace, asked.namespace),
            (self.name, asked.name), (self.user, user),
        )  # fmt: skip
        return all(not want or want == have for want, have in wanted)


class Faults:
    """What the server shall do wrong. `clear` puts everything right."""

    def __init__(self, cut: Callable[[], int]) -> None:
        self._cut = cut
        self._random = random.Random(0)
        self._faults: list[Fault] = []

    def fail(self, *, status: int = 500, **what: Any) -> Fault:
        """Answer matching requests with an error; `what` are fields of `Fault`."""
        return self._add(Fault(status=status, **what))

    def delay(self, seconds: float, **what: Any) -> Fault:
        """Let matching requests wait before anything is done for them."""
        return self._add(Fault(delay=seconds, **what))

    def hold(self, until: asyncio.Event, **what: Any) -> Fault:
        """Let matching requests wait for an event before anything is done for them."""
        return self._add(Fault(until=until, **what))

    def _add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def cut_watches(self) -> int:
        """Drop the connection of every open watch. Returns how many there were."""
        return self._cut()

    def remove(self, fault: Fault) -> None:
        self._faults.remove(fault)

    def clear(self) -> None:
        self._faults.clear()

    async def strike(self, asked: Attributes, user: str) -> None:
        """Let a request wait as it shall. Raises the `ApiError` that it is answered with, if any."""
        struck = []
        for fault in self._faults:
            if not fault.applies(asked, user) or self._random.random() >= fault.probability:
                continue
            fault.hits += 1
            struck.append(fault)
            if fault.status:
                break
        for fault in struck:
            if fault.until is not None:
                await fault.until.wait()
        if wait := sum(fault.delay for fault in struck):
            await asyncio.sleep(wait)
        if struck and struck[-1].status:
            raise _error(struck[-1], asked)


def _error(fault: Fault, asked: Attributes) -> ApiError:
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    details = {"name": asked.name, "group": asked.group, "kind": asked.resource}
    shown: dict[str, object] = {key: value for key, value in details.items() if value}
    if fault.retry_after is not None:
        shown["retryAfterSeconds"] = fault.retry_after
    message = fault.message or f"injected fault: {fault.status} {REASONS.get(fault.status, '')}".rstrip()
    return ApiError(fault.status, message, details=shown, headers=headers)
