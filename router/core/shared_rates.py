"""One rate for a key, however many routers it is used at: what each tells the others of its use, and what that does to
their buckets. Pure; times in seconds of any one clock.

Each router admits by its own buckets, and takes out of them what the others say they have let through since they said
so last. Nobody waits for anybody: what others admit in between is not known, and may put a key into debt, which it then
has to wait for. Over time a key gets its rate once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.core.rates import Bucket, RateLimiter

SILENCE = 5.0
"""Seconds after which a router that answers again counts as new: what it let through meanwhile has come back by now, or
most of it, and to take it all at once would stop a key that has done nothing wrong."""
Limiters = Mapping[str, RateLimiter]
"""The rates of keys, by `key_name`."""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What one router says of one key: how much it has let through itself since it started, and what is left in its
    buckets; None: there is no such rate."""

    requests: int
    tokens: int
    requests_left: float | None = None
    tokens_left: float | None = None


@dataclass(frozen=True, slots=True)
class RateReport:
    """What one router says. `instance` identifies its process."""

    instance: str
    keys: dict[str, KeyUse]
    """By `key_name`: those that were used within `SILENCE`; to who knows nothing of this process yet, all that it has
    let anything through for. One that is left out has not been used since it was last told of."""


def key_name(digest: bytes) -> str:
    """How routers name a key to one another: not by its digest, by which it is looked up."""
    return hashlib.sha256(digest).hexdigest()[:16]


def report(instance: str, limiters: Limiters, now: float, *, known: bool) -> RateReport:
    """What this router says now, to one that knows it already or does not."""
    used = {
        name: KeyUse(limiter.used_requests, limiter.used_tokens, *(_left(each, now) for each in _buckets(limiter)))
        for name, limiter in limiters.items()
        if now - limiter.used_at <= SILENCE or (not known and limiter.used_requests)
    }
    return RateReport(instance, used)


@dataclass(slots=True)
class _Peer:
    """What another router said last of each key, and when it said anything."""

    heard: float
    keys: dict[str, KeyUse] = field(default_factory=dict)


@dataclass(slots=True)
class SharedRates:
    """What the other routers have said."""

    _peers: dict[str, _Peer] = field(default_factory=dict, init=False)

    def learn(self, said: RateReport, limiters: Limiters, now: float) -> None:
        """Another router says this now."""
        peer = self._peers.get(said.instance)
        if peer is None or not self.knows(said.instance, now):
            # Which part of its counts is new, nobody knows. What is left there is the least that can be left here.
            self._peers[said.instance] = _Peer(now, dict(said.keys))
            for name, use in said.keys.items():
                if (limiter := limiters.get(name)) is not None:
                    for bucket, left in zip(_buckets(limiter), (use.requests_left, use.tokens_left), strict=True):
                        _lower(bucket, left, now)
            return
        peer.heard = now
        for name, use in said.keys.items():
            before = peer.keys.get(name, _UNUSED)
            peer.keys[name] = use
            if (limiter := limiters.get(name)) is not None:
                limiter.used_elsewhere(use.requests - before.requests, use.tokens - before.tokens, now)

    def knows(self, instance: str, now: float) -> bool:
        """Whether this router has been heard lately: what it says next continues what it has said."""
        peer = self._peers.get(instance)
        return peer is not None and now - peer.heard <= SILENCE

    def forget(self, now: float) -> None:
        """Keep nothing of routers that have been silent for too long."""
        self._peers = {instance: peer for instance, peer in self._peers.items() if now - peer.heard <= SILENCE}

    def known(self) -> int:
        """How many routers' use is counted."""
        return len(self._peers)


_UNUSED = KeyUse(0, 0)


def _buckets(limiter: RateLimiter) -> tuple[Bucket | None, Bucket | None]:
    return limiter.requests, limiter.tokens


def _left(bucket: Bucket | None, now: float) -> float | None:
    return None if bucket is None else bucket.level(now)


def _lower(bucket: Bucket | None, left: float | None, now: float) -> None:
    if bucket is not None and left is not None and (surplus := bucket.level(now) - left) > 0:
        bucket.take(surplus, now)
