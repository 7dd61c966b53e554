"""The workers that a source of workers names. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.core.worker_state import Intake


@dataclass(frozen=True, slots=True)
class DiscoveredWorker:
    """What a source says of one worker."""

    intake: Intake = Intake.OPEN
    """What the worker does with new requests."""
    feed: str | None = None
    """Base URL of its cache feed; None: the worker serves it itself."""
    pod: str = ""
    """Name of its pod; empty: not known."""
    uid: str = ""
    """UID of its pod; empty: not known."""

    def continues(self, earlier: DiscoveredWorker) -> bool:
        """Whether this is the same worker with the same feed, so that what is known of it stays true."""
        return (self.uid, self.feed) == (earlier.uid, earlier.feed)


DiscoveredWorkers = Mapping[str, DiscoveredWorker]
"""URL of every worker there is -> what is said of it."""
