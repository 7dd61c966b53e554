"""How many requests and tokens a minute one API key may use: token buckets. Pure; times in seconds of any one clock.

A bucket holds a minute's worth at most and fills evenly. Requests are paid for when they arrive. Tokens are too, by an
estimate, because how long an answer will be is not known; what it really used is settled at its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

MINUTE = 60.0
_ROUNDING = 1e-9
"""Below this share of a unit a difference is what rounding left."""


class Limit(StrEnum):
    """What a key has used up. Label `limit` of `kvcluster_router_rate_limited_total`."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Rates:
    """What a key may use a minute; None: any number."""

    requests: float | None = None
    tokens: float | None = None


UNLIMITED = Rates()


class Bucket:
    """A token bucket, full at first. Its level is negative while more is owed than was there."""

    __slots__ = ("_at", "_level", "capacity")

    def __init__(self, capacity: float, now: float) -> None:
        """`capacity`: units a minute, and the most that it holds."""
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        """Units that are there now. A time before an earlier call's changes nothing."""
        if now > self._at:
            self._level = min(self._level + (now - self._at) * self.capacity / MINUTE, self.capacity)
            self._at = now
        return self._level

    def wait(self, units: float, now: float) -> float:
        """Seconds until so many units are there, or until it is full if it never holds so many; 0.0: they are."""
        lacking = min(units, self.capacity) - self.level(now)
        return lacking * MINUTE / self.capacity if lacking > _ROUNDING * self.capacity else 0.0

    def take(self, units: float, now: float) -> None:
        """Take units, whether they are there or not; negative: give units back, as many as it has room for."""
        self._level = min(self.level(now) - units, self.capacity)

    def resize(self, capacity: float, now: float) -> None:
        """Let it hold, and get, so many units a minute from now on. What has been used stays used."""
        used = self.capacity - self.level(now)
        self.capacity = capacity
        self._level = capacity - used


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A request that is not admitted. `retry_after`: seconds until one would be, if no other is before it."""

    limit: Limit
    rate: float
    """What the key may use a minute."""
    retry_after: float


class RateLimiter:
    """The buckets of one key. `used_requests` and `used_tokens` count what this router has let through, at `used_at`
    last."""

    __slots__ = ("requests", "tokens", "used_at", "used_requests", "used_tokens")

    def __init__(self, rates: Rates, now: float) -> None:
        self.requests = Bucket(rates.requests, now) if rates.requests is not None else None
        self.tokens = Bucket(rates.tokens, now) if rates.tokens is not None else None
        self.used_at = -math.inf
        self.used_requests = 0
        self.used_tokens = 0

    def arrive(self, now: float) -> Exceeded | None:
        """A request arrives, whose size is not known yet. It is paid for unless it is refused."""
        if self.requests is not None and (wait := self.requests.wait(1.0, now)):
            return Exceeded(Limit.REQUESTS, self.requests.capacity, wait)
        if self.tokens is not None and (wait := self.tokens.wait(1.0, now)):
            return Exceeded(Limit.TOKENS, self.tokens.capacity, wait)
        if self.requests is not None:
            self.requests.take(1.0, now)
        self.used_requests += 1
        self.used_at = now
        return None

    def charge(self, tokens: int, now: float) -> Exceeded | None:
        """Pay for the estimated tokens of a request that has arrived. One that is larger than the bucket is admitted
        when that is full, and the key owes the rest. One that is refused does not count as a request either."""
        if self.tokens is None:
            return None
        if wait := self.tokens.wait(tokens, now):
            if self.requests is not None:
                self.requests.take(-1.0, now)
            return Exceeded(Limit.TOKENS, self.tokens.capacity, wait)
        self.tokens.take(tokens, now)
        self.used_tokens += tokens
        self.used_at = now
        return None

    def settle(self, charged: int, used: int, now: float) -> None:
        """A request that was charged for `charged` tokens has used `used` in the end."""
        if self.tokens is not None and used != charged:
            self.tokens.take(used - charged, now)
            self.used_tokens += used - charged
            self.used_at = now

    def used_elsewhere(self, requests: int, tokens: int, now: float) -> None:
        """Other routers have let so much through: the key pays for it here, too."""
        if self.requests is not None:
            self.requests.take(requests, now)
        if self.tokens is not None:
            self.tokens.take(tokens, now)

    def change(self, rates: Rates, now: float) -> None:
        """The key may use other rates from now on. What it has used of them stays used."""
        self.requests = _changed(self.requests, rates.requests, now)
        self.tokens = _changed(self.tokens, rates.tokens, now)


def _changed(bucket: Bucket | None, capacity: float | None, now: float) -> Bucket | None:
    if capacity is None:
        return None
    if bucket is None:
        return Bucket(capacity, now)
    if bucket.capacity != capacity:
        bucket.resize(capacity, now)
    return bucket
