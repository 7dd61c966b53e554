"""Where the requests of a session went: what breaks ties between workers that cost the same. Pure."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import NamedTuple


class Session(NamedTuple):
    """The session that a request states. `key` is a digest: the size of what a client states does not matter."""

    key: bytes
    hint: bool = False
    """It is only a hint (`prompt_cache_key`, `user`): requests that share it may belong to different conversations."""


def session_of(kind: str, name: str, model: str | None, *, hint: bool = False) -> Session:
    """The session called `name`. Sessions of different kinds or models are different ones, whatever their names."""
    return Session(blake2b(f"{kind}\0{model or ''}\0{name}".encode(errors="replace"), digest_size=16).digest(), hint)


class SessionTable:
    """The worker of each session that was active within the last `ttl` seconds, for at most `limit` sessions, of which
    the one that has been inactive for longest is forgotten first.

    O(1) a request; about 250 bytes a session. A `limit` or `ttl` of 0 remembers nothing.
    """

    __slots__ = ("_limit", "_ttl", "_workers")

    def __init__(self, ttl: float, limit: int) -> None:
        self._ttl = ttl
        self._limit = limit if ttl > 0 else 0
        self._workers: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        """The worker's URL and the time of the last request, in the order of these times."""

    def find(self, session: Session, now: float) -> str | None:
        """URL of the worker that got the session's last request; None if there was none lately."""
        found = self._workers.get(session.key)
        return found[0] if found is not None and now - found[1] <= self._ttl else None

    def note(self, session: Session, url: str, now: float) -> None:
        """A request of the session goes to this worker."""
        workers = self._workers
        workers[session.key] = (url, now)
        workers.move_to_end(session.key)
        self.expire(now)
        if len(workers) > self._limit:
            workers.popitem(last=False)

    def expire(self, now: float) -> None:
        """Forget the sessions that have been inactive for too long."""
        workers = self._workers
        while workers and now - next(iter(workers.values()))[1] > self._ttl:
            workers.popitem(last=False)

    def __len__(self) -> int:
        return len(self._workers)
