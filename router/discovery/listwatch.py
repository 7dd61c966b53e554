"""Kubernetes' list-then-watch over EndpointSlices as a state machine: answers in, next question and workers out.

The shell (`kubernetes`) asks what `next` says, hands in what comes, and sleeps for as long as `failed` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from router.discovery.discovered import DiscoveredWorkers
from router.discovery.endpointslices import Slice, discovered_workers, read_slice
from runtime.backoff import Backoff


class Cause(StrEnum):
    """Why a list or a watch failed. Label of `kvcluster_router_discovery_failures_total`."""

    CONNECT = "connect"
    """The API server could not be reached, or did not answer in time."""
    UNAUTHORIZED = "unauthorized"
    """401: the credentials are not accepted (expired, or of another cluster)."""
    FORBIDDEN = "forbidden"
    """403: the service account may not list or watch EndpointSlices here."""
    THROTTLED = "throttled"
    """429: asked to come back later."""
    SERVER = "server_error"
    """Any 5xx."""
    STATUS = "status"
    """Any other status."""
    CUT = "cut"
    """The watch broke off, or ended at once."""
    SILENT = "silent"
    """The watch brought nothing, not even its end, for longer than the server lets one last."""
    ERROR_EVENT = "error_event"
    """The watch brought an ERROR event other than 410."""
    MALFORMED = "malformed"
    """What came is not what the API promises."""
    UNEXPECTED = "unexpected"
    """A mistake of the router's own."""
    EXPIRED = "expired"
    """410, as a status or as an event: the position is no longer kept. No failure: the list is read again at once."""


QUIET = frozenset({Cause.CUT, Cause.EXPIRED})
"""What happens in a cluster that works; worth a line only if it happens again at once."""


class Relist(StrEnum):
    """Why the whole list was read again. Label of `kvcluster_router_discovery_relists_total`."""

    EXPIRED = "expired"
    """The position to go on from is no longer kept (410)."""
    FAILURES = "failures"
    """Watching from there failed twice in a row."""
    PERIODIC = "periodic"
    """It was time: whatever was missed is put right."""


class ApiFailure(Exception):
    """A list or a watch failed. `retry_after`: seconds the API server asks us to wait."""

    def __init__(self, cause: Cause, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds, unless said otherwise."""

    shortest_watch: int = 10
    longest_watch: int = 14
    """The API server ends a watch after a time between the two: routers do not come back all at once, and a connection
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


class ListWatch:
    """The slices of one Service as the API server last told them.

    Invariant: once something was listed, `workers` are those of the slices at `_version`, or, while a list is
    due, of the last state known; it is never empty for want of an answer. `chance` gives numbers from 0 up to 1.
    """

    def __init__(self, chance: Callable[[], float], policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self._chance = chance
        self._slices: dict[str, Slice] = {}
        self._version: str | None = None
        self._relist: Relist | None = None
        self._relist_at = 0.0
        self._opened_at = 0.0
        self.workers: DiscoveredWorkers | None = None
        """None until the first list."""
        self.confirmed_at: float | None = None
        """When the API server last showed that `workers` is right."""
        self.streak = 0
        """Failures since a watch last worked."""
        self.failure: ApiFailure | None = None
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
        """The answer to a list. Raises `ApiFailure` if it is none; then nothing changed."""
        try:
            version = found["metadata"]["resourceVersion"]  # type: ignore[index]
            slices = {item["metadata"]["name"]: read_slice(item) for item in found["items"] or ()}  # type: ignore[index]
        except (TypeError, KeyError, AttributeError) as error:
            raise ApiFailure(Cause.MALFORMED, f"the API server's list makes no sense: {error!r:.200}") from None
        if self._relist is not None:
            self.relists[self._relist.value] += 1
            self._relist = None
        self._version = version
        self._relist_at = now + self.policy.relist * (1.0 + 0.2 * self._chance())
        self.confirmed_at = now
        self._slices = slices
        self.workers = discovered_workers(slices.values())

    def opened(self, now: float) -> None:
        """The watch was answered: from its position on everything will come."""
        self._opened_at = self.confirmed_at = now

    def event(self, found: object, now: float) -> None:
        """One event of the watch. Raises `ApiFailure` for an ERROR and for what is no event; then nothing changed."""
        try:
            kind, about = found["type"], found["object"]  # type: ignore[index]
            if kind == "ERROR":
                raise error_event(about)
            name, version = about["metadata"].get("name", ""), about["metadata"]["resourceVersion"]
            read = read_slice(about) if kind in ("ADDED", "MODIFIED") else ()
        except (TypeError, KeyError, AttributeError) as error:
            raise ApiFailure(Cause.MALFORMED, f"the API server's event makes no sense: {error!r:.200}") from None
        if kind in ("ADDED", "MODIFIED"):
            self._slices[name] = read
        elif kind == "DELETED":
            self._slices.pop(name, None)
        elif kind != "BOOKMARK":
            raise ApiFailure(Cause.MALFORMED, f"the API server sent an event of type {kind!r:.50}")
        self._version = version
        self.confirmed_at = now
        if kind != "BOOKMARK":
            self.workers = discovered_workers(self._slices.values())

    def settled(self) -> None:
        """The watch works."""
        self.streak = 0
        self.failure = None

    def ended(self, now: float) -> None:
        """The watch ended as it should. Raises `ApiFailure` if it has hardly begun."""
        lasted = now - self._opened_at
        if lasted < self.policy.settled:
            raise ApiFailure(Cause.CUT, f"the API server ended the watch after {lasted:.1f} s")
        self.settled()
        self.confirmed_at = now

    def failed(self, failure: ApiFailure, now: float) -> float:
        """A list or a watch failed. Seconds to wait before what `next` says."""
        self.streak += 1
        self.failure = failure
        expired = failure.cause is Cause.EXPIRED
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
        """Seconds since the workers were last confirmed; None before the first list."""
        return None if self.confirmed_at is None or self.workers is None else now - self.confirmed_at

    def healthy(self, now: float) -> bool:
        """Whether the workers were confirmed lately."""
        age = self.age(now)
        return age is not None and age <= self.policy.stale_after


def error_event(status: Mapping[str, Any]) -> ApiFailure:
    """What an ERROR event means."""
    failure = status_failure(status.get("code") or 500, "", status)
    return (
        failure if failure.cause is Cause.EXPIRED else ApiFailure(Cause.ERROR_EVENT, str(failure), failure.retry_after)
    )


_CAUSES = {401: Cause.UNAUTHORIZED, 403: Cause.FORBIDDEN, 410: Cause.EXPIRED, 429: Cause.THROTTLED}


def status_failure(code: int, retry_after: str, status: object) -> ApiFailure:
    """What an answer that is not 200 means. `retry_after` is its header, `status` the Status object in its body."""
    said = status if isinstance(status, Mapping) else {}
    cause = _CAUSES.get(code, Cause.SERVER if code >= 500 else Cause.STATUS)
    message = f"the API server answered {code}: {said.get('message') or said.get('reason') or 'no reason given'}"
    seconds = None
    if cause in (Cause.THROTTLED, Cause.SERVER):
        details = said.get("details")
        seconds = details.get("retryAfterSeconds") if isinstance(details, Mapping) else None
        if retry_after.isdecimal():
            seconds = int(retry_after)
    return ApiFailure(cause, message[:500], float(seconds) if isinstance(seconds, int) and seconds > 0 else None)
