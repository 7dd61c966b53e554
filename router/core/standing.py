"""What has changed since the last decision, and what a worker's part of a cost is until it changes again.

A decision among many workers looks only at those that changed since the last one: `Changes` collects them. What the
cost of a request on a worker depends on apart from the request, the time and the fleet is a `Standing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from router.core.work import Work


class Changes:
    """Shared by a fleet and its workers, which note here what they change. O(1) a change."""

    __slots__ = ("members", "on_room", "phases", "sampling", "views", "works")

    def __init__(self) -> None:
        self.members = 0
        """Workers that joined, left, or have caches of another shape than before."""
        self.phases = 0
        """Changes of the phases of workers."""
        self.views = 0
        """Changes of which views may be used, other than by the time."""
        self.works: set[Work] = set()
        """Those whose standing has changed."""
        self.sampling: dict[Work, None] = {}
        """Those that have a sample to be taken once it is clear that it is complete, in the order of these samples."""
        self.on_room: Callable[[], None] = _ignore
        """Called when a worker may have room that had none."""

    def take_samples(self, now: float) -> None:
        """Take the samples that are complete by now, so that all workers are compared with the same corrections."""
        for work in tuple(self.sampling):
            if not work.take_sample(now):
                del self.sampling[work]


def _ignore() -> None:
    pass


NEVER = math.inf
"""A time that does not come."""


class Standing(NamedTuple):
    """Figures of one worker that stay as they are until `until`, or until the worker is in `Changes.works`. The names
    are those of `router.core.work`; `router.core.field` computes with them.

    It names the columns. What is written to them are plain tuples (`Work.standing`), which are made in a third of the
    time. The first five fields are those of `Ledger.waiting_at`.
    """

    until: float
    """When the ledger changes by itself."""
    pending: float
    """1 if a first token is awaited, otherwise 0."""
    seconds: float
    """Predicted prefill of all requests without a first token."""
    began: float
    """When the first of them began."""
    at_once: float
    """Most seconds of it that can be done without a first token being seen."""
    late_from: float
    """When its oldest request that does not stream is late."""
    foreign_seconds: float
    reported_at: float
    step: float
    """Seconds of a decode step, uncorrected; 0: nothing decodes."""
    others: float
    """Requests on the worker."""
    foreign: float
    """Those of other routers."""
    theirs: float
    """Seconds by which they lengthen each step of a new request, uncorrected."""
    left: float
    """Tokens that each of them will still generate; NaN: what answers have left on average."""
    token_share: float
    used: float
    capacity: float
    """Infinite if it is not known."""
    room: float
    """Blocks by which the capacity exceeds those in use."""
    assigned: float
    """Logarithm of the prefill assigned to it, as if it had been assigned at time 0: it orders the workers by assigned
    seconds at any time."""
    turn: float
    prefill_log: float
    """Of the worker's own factors: NaN as long as they are not told apart from the fleet's."""
    decode_log: float
    prefill_mass: float
    decode_mass: float
