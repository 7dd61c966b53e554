"""Who the workers are, as a source of workers tells it. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum


class Intake(IntEnum):
    """What a worker does with new requests; the larger is the graver."""

    OPEN = 0
    """It takes them."""
    DRAINING = 1
    """It leaves and still takes them: for when there is no other worker."""
    CLOSED = 2
    """It takes none, and finishes what it has."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source says of one worker."""

    intake: Intake = Intake.OPEN
    """What it does with new requests."""
    feed: str | None = None
    """Base URL of its cache feed; None: the worker serves it itself."""
    pod: str = ""
    """Name of its pod; empty: not known."""
    uid: str = ""
    """Of the pod; empty: not known."""

    def continues(self, earlier: Listing) -> bool:
        """Whether this is the same worker with the same feed, so that what is known of it stays true."""
        return (self.uid, self.feed) == (earlier.uid, earlier.feed)


Membership = Mapping[str, Listing]
"""URL of every worker there is -> what is said of it."""
