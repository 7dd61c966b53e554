"""A retry budget: how many requests may be sent again, as a share of those that came.

Without one, retries multiply the load exactly when workers fail because of it. After Finagle's `RetryBudget`: over a
sliding window, retries are at most a share of the requests plus a floor for when there is little traffic.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW = 10
"""Seconds over which requests and retries are counted, in slots of a second."""


@dataclass(slots=True)
class _Slot:
    second: int
    requests: int = 0
    retries: int = 0


class RetryBudget:
    """In any `WINDOW` seconds: retries <= `share` x requests + `floor` x WINDOW. O(1), at most WINDOW slots."""

    def __init__(self, *, share: float, floor: float) -> None:
        self._share = share
        self._floor = floor
        self._slots: deque[_Slot] = deque()
        self._requests = self._retries = 0

    def request(self, now: float) -> None:
        """A request has come; `now` in seconds."""
        self._slot(now).requests += 1
        self._requests += 1

    def retry(self, now: float) -> bool:
        """Whether a request may be sent again; if so, that is counted."""
        slot = self._slot(now)
        if self._retries + 1 > self._share * self._requests + self._floor * WINDOW:
            return False
        slot.retries += 1
        self._retries += 1
        return True

    def _slot(self, now: float) -> _Slot:
        second = int(now)
        while self._slots and self._slots[0].second <= second - WINDOW:
            old = self._slots.popleft()
            self._requests -= old.requests
            self._retries -= old.retries
        if not self._slots or self._slots[-1].second != second:
            self._slots.append(_Slot(second))
        return self._slots[-1]
