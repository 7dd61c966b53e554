"""Kubernetes' list-then-watch over one collection as a state machine: answers in, next question and objects out. Pure.

`reflector` asks what `next` says, hands in what comes, and sleeps for as long as `failed` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

from runtime.backoff import Backoff
from runtime.kube.errors import ApiFailureCause, KubeApiError, error_event

T = TypeVar("T")

Key = tuple[str, str]
"""Namespace and name of an object."""

QUIET = frozenset({ApiFailureCause.CUT, ApiFailureCause.EXPIRED})
"""What happens in a cluster that works; worth a line only if it happens again at once."""


class Relist(StrEnum):
    """Why the whole list was read again. Label of `kvcluster_router_discovery_relists_total`."""

    EXPIRED = "expired"
    """The position to go on from is no longer kept (410)."""
    FAILURES = "failures"
    """Watching from there failed twice in a row."""
    PERIODIC = "periodic"
    """It was time: whatever was missed is put right."""


@dataclass(frozen=True, slots=True)
class ListWatchPolicy:
    """Seconds, unless said otherwise."""

    shortest_watch: int = 10
    longest_watch: int = 14
    """The API server ends a watch after a time between the two: watchers do not come back all at once, and a connection
    that is dead without a word is known within 20 s."""
    slack: float = 3.0
    """How much later than asked for a watch may end before its connection is taken for dead."""
    settled: float = 2.0
    """A watch that has lasted this long works: earlier failures are over."""
    relist: float = 300.0
    """Between two lists; up to a fifth more at random."""
    retry: Backoff = Backoff(0.2, 5.0)
    longest_retry_after: float = 60.0
    """More than this the API server cannot ask of us."""
    stale_after: float = 60.0
    """A list that has not been confirmed for this long is called unhealthy."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Watch from this resource version for this many seconds; `None` in its place: list."""

    version: str
    seconds: int


_PRESENT = frozenset({"ADDED", "MODIFIED"})
_NO_SENSE = (TypeError, KeyError, AttributeError, ValueError)


class WatchEvent(NamedTuple):
    """One event of a watch."""

    kind: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    item: Mapping[str, Any]
    """The object, or of a BOOKMARK one that has a resource version only."""
    version: str


def watch_event(found: object) -> WatchEvent:
    """What the API server sent. Raises `KubeApiError` for an ERROR and for what is no event."""
    try:
        kind, item = found["type"], found["object"]  # type: ignore[index]
        if kind == "ERROR":
            raise error_event(item)
        change = WatchEvent(kind, item, item["metadata"]["resourceVersion"])
        if kind != "BOOKMARK":
            _key(item["metadata"])
    except _NO_SENSE as error:
        raise _no_event(error) from None
    if kind not in _PRESENT and kind not in ("DELETED", "BOOKMARK"):
        raise KubeApiError.of(ApiFailureCause.MALFORMED, f"the API server sent an event of type {kind!r:.50}")
    return change


def _no_event(error: Exception) -> KubeApiError:
    return KubeApiError.of(ApiFailureCause.MALFORMED, f"the API server's event makes no sense: {error!r:.200}")


def _key(metadata: Mapping[str, Any]) -> Key:
    return metadata.get("namespace", ""), metadata["name"]


class ListWatch(Generic[T]):
    """The objects of one collection as the API server last told them; `read` makes of each what is kept of it.

    Invariant: once something was listed, `objects` are those at `_version`, or, while a list is due, those of the last
    version known; a want of answers never empties them. `read` raises `TypeError`, `KeyError`, `AttributeError` or
    `ValueError` for what is no such object. `chance` gives numbers from 0 up to 1.
    """

    def __init__(
        self, read: Callable[[Mapping[str, Any]], T], chance: Callable[[], float], policy: ListWatchPolicy | None = None
    ) -> None:
        self.policy = policy or ListWatchPolicy()
        self._read = read
        self._chance = chance
        self._version: str | None = None
        """None: a list is due."""
        self._relist: Relist | None = None
        self._relist_at = 0.0
        self._opened_at = 0.0
        self.objects: dict[Key, T] | None = None
        """None until the first list."""
        self.revision = 0
        """Grows whenever `objects` may have changed."""
        self.confirmed_at: float | None = None
        """When the API server last showed that `objects` is right."""
        self.streak = 0
        """Failures since a watch last worked."""
        self.failure: KubeApiError | None = None
        """The last of them."""
        self.failures: Counter[str] = Counter()
        self.relists: Counter[str] = Counter()

    # --- what to ask ------------------------------------------------------------------------------------

    def next(self, now: float) -> Watch | None:
        """The watch to open now; None: read the list."""
        if self._version is not None and now >= self._relist_at:
            self._version, self._relist = None, Relist.PERIODIC
        if self._version is None:
            return None
        shortest, longest = self.policy.shortest_watch, self.policy.longest_watch
        return Watch(self._version, shortest + round(self._chance() * (longest - shortest)))

    # --- what came --------------------------------------------------------------------------------------

    def listed(self, found: object, now: float) -> None:
        """The answer to a list. Raises `KubeApiError` if it is none; then nothing changed."""
        try:
            version = found["metadata"]["resourceVersion"]  # type: ignore[index]
            objects = {_key(item["metadata"]): self._read(item) for item in found["items"] or ()}  # type: ignore[index]
        except _NO_SENSE as error:
            message = f"the API server's list makes no sense: {error!r:.200}"
            raise KubeApiError.of(ApiFailureCause.MALFORMED, message) from None
        if self._relist is not None:
            self.relists[self._relist.value] += 1
            self._relist = None
        self._version = version
        self._relist_at = now + self.policy.relist * (1.0 + 0.2 * self._chance())
        self.confirmed_at = now
        self.objects = objects
        self.revision += 1

    def opened(self, now: float) -> None:
        """The watch was answered: from its position on everything will come."""
        self._opened_at = self.confirmed_at = now

    def event(self, found: object, now: float) -> None:
        """One event of the watch. Raises `KubeApiError` for an ERROR and for what is no event; then nothing changed."""
        change = watch_event(found)
        if self.objects is None:
            raise RuntimeError("a watch follows a list")
        if change.kind in _PRESENT:
            try:
                self.objects[_key(change.item["metadata"])] = self._read(change.item)
            except _NO_SENSE as error:
                raise _no_event(error) from None
        elif change.kind == "DELETED":
            self.objects.pop(_key(change.item["metadata"]), None)
        self._version = change.version
        self.confirmed_at = now
        if change.kind != "BOOKMARK":
            self.revision += 1

    def settled(self) -> None:
        """The watch works."""
        self.streak = 0
        self.failure = None

    def ended(self, now: float) -> None:
        """The watch ended as it should. Raises `KubeApiError` if it has hardly begun."""
        lasted = now - self._opened_at
        if lasted < self.policy.settled:
            raise KubeApiError.of(ApiFailureCause.CUT, f"the API server ended the watch after {lasted:.1f} s")
        self.settled()
        self.confirmed_at = now

    def failed(self, failure: KubeApiError, now: float) -> float:
        """A list or a watch failed. Seconds to wait before what `next` says."""
        self.streak += 1
        self.failure = failure
        expired = failure.cause is ApiFailureCause.EXPIRED
        if not expired:
            self.failures[failure.cause.value] += 1
        if self._version is not None and (expired or self.streak > 1):
            self._version = None
            self._relist = Relist.EXPIRED if expired else Relist.FAILURES
        if failure.retry_after is not None:
            wait = min(failure.retry_after, self.policy.longest_retry_after)
            return wait * (1.0 + 0.1 * self._chance())
        if expired and self.streak == 1:
            return 0.0
        return self.policy.retry.delay(self.streak, self._chance())

    # --- how it is doing --------------------------------------------------------------------------------

    def age(self, now: float) -> float | None:
        """Seconds since the objects were last confirmed; None before the first list."""
        return None if self.confirmed_at is None or self.objects is None else now - self.confirmed_at

    def healthy(self, now: float) -> bool:
        """Whether the objects were confirmed lately."""
        age = self.age(now)
        return age is not None and age <= self.policy.stale_after
