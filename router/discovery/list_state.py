"""How well a list that is read from an API server is known, and what the log says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from runtime.kube.errors import KubeApiError
from runtime.kube.listwatch import QUIET, ListWatch
from runtime.logs import EventLogger

logger = EventLogger(__name__)


class ListState(Enum):
    """How well the list of workers is known; each change is one line in the log."""

    CURRENT = "current"
    LOST = "lost"
    """The API server fails; the last list is as good as new."""
    STALE = "stale"
    """It has failed for so long that the last list may be wrong."""


class ListEvent(Enum):
    """What changes how well the list is known."""

    FAILED = "failed"
    """A list or a watch failed, and not only for a moment."""
    EXPIRED = "expired"
    """The list has not been confirmed for `ListWatchPolicy.stale_after`."""
    SETTLED = "settled"
    """A watch works."""


LIST_TRANSITIONS: Mapping[tuple[ListState, ListEvent], ListState] = {
    (ListState.CURRENT, ListEvent.FAILED): ListState.LOST,
    (ListState.LOST, ListEvent.EXPIRED): ListState.STALE,
    (ListState.LOST, ListEvent.SETTLED): ListState.CURRENT,
    (ListState.STALE, ListEvent.SETTLED): ListState.CURRENT,
}
"""What is not listed changes nothing."""


class WatchedList:
    """The state of one list, and a line in the log for each of its changes. `where` names the list there; `clock` in
    seconds."""

    def __init__(self, where: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._where = where
        self._clock = clock
        self._state = ListState.CURRENT
        self._lost_at = 0.0

    def settled(self) -> None:
        """A watch works."""
        if self._advance(ListEvent.SETTLED):
            logger.info("discovery_restored", after_seconds=self._clock() - self._lost_at)

    def failed(self, failure: KubeApiError, state: ListWatch[Any], workers: int | None) -> None:
        """A list or a watch failed. One line when it begins to fail, one when that has lasted. `workers`: how many are
        known by the list; None: it was never read."""
        now = self._clock()
        lasts = state.streak > 1 or failure.cause not in QUIET
        if lasts and self._advance(ListEvent.FAILED):
            self._lost_at = now
            why, cause = str(failure), failure.cause.value
            logger.warning("discovery_lost", **self._where, cause=cause, why=why)
        if workers is not None and not state.healthy(now) and self._advance(ListEvent.EXPIRED):
            logger.error(
                "discovery_stale",
                age=state.age(now),
                workers=workers,
                why=f"{failure}: the workers last known are used",
            )

    def _advance(self, event: ListEvent) -> bool:
        """The only way in which the list's state changes; whether it did."""
        before = self._state
        self._state = LIST_TRANSITIONS.get((before, event), before)
        return self._state is not before
