"""The cache feed's outgoing side: numbers what the engine changed, remembers it for a while, hands it to subscribers.

Nothing here knows of sockets or clocks: the runner (or the agent) publishes, `worker.feed.endpoints` streams,
`worker.feed.push` pushes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvcache.feed import Batch, Event, Load, encode_batch, encode_position

HISTORY_BATCHES = 8192
HISTORY_BYTES = 4 * 2**20
"""A subscriber that was away for less than this resumes where it was; else it takes a new snapshot."""

SUBSCRIBER_BYTES = 2**20
"""What a subscriber may leave unread before it is dropped."""


def sse_frame(position: str, name: str, data: bytes) -> bytes:
    """One server-sent event."""
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (position.encode(), name.encode(), data)


class Subscriber:
    """One reader of the feed. Frames wait here, bounded; of load reports only the newest."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._frames: list[bytes] = []
        self._bytes = 0
        self._load: bytes | None = None
        self.overrun = False
        """Its frames are gone, and it must take a new snapshot: it read too slowly, or the epoch ended."""

    def batch(self, frame: bytes) -> None:
        """Queue a batch. A load report that still waits is older than the batch's own load, hence dropped."""
        if self.overrun:
            return
        self._load = None
        self._bytes += len(frame)
        if self._bytes > SUBSCRIBER_BYTES:
            self.drop()
        else:
            self._frames.append(frame)
            self._wake()

    def drop(self) -> None:
        """Take away what waits; it must take a new snapshot."""
        self.overrun = True
        self._frames.clear()
        self._load = None
        self._wake()

    def load(self, frame: bytes) -> None:
        """Replace the load report that waits."""
        if not self.overrun:
            self._load = frame
            self._wake()

    def take(self) -> bytes:
        """Everything that waits, in order."""
        if self._load is not None:
            self._frames.append(self._load)
            self._load = None
        taken = b"".join(self._frames)
        self._frames.clear()
        self._bytes = 0
        return taken


class FeedLog:
    """Batches of one epoch (at a time). `seq` is the last batch's number; `load` the last load that was published."""

    def __init__(self, epoch: int, load: Load) -> None:
        self.epoch = epoch
        self.seq = 0
        self.load = load
        self.resets = 0
        """Subscribers that were told to take a new snapshot."""
        self._history: deque[bytes] = deque()  # frames of the batches seq - len + 1 .. seq
        self._history_bytes = 0
        self._subscribers: set[Subscriber] = set()
        self._listeners: list[Callable[[Sequence[Event]], None]] = []

    @property
    def position(self) -> str:
        """`epoch:seq` of the last batch."""
        return encode_position(self.epoch, self.seq)

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Call `listener` with the events of every batch from now on."""
        self._listeners.append(listener)

    def publish(self, events: Sequence[Event], load: Load) -> None:
        """Number a batch, remember it and hand it to every subscriber."""
        self.seq += 1
        self.load = load
        data = encode_batch(Batch(self.epoch, self.seq, tuple(events), load))
        frame = sse_frame(self.position, "batch", data)
        self._history.append(frame)
        self._history_bytes += len(frame)
        while len(self._history) > HISTORY_BATCHES or self._history_bytes > HISTORY_BYTES:
            self._history_bytes -= len(self._history.popleft())
        for subscriber in tuple(self._subscribers):
            subscriber.batch(frame)
        for listener in self._listeners:
            listener(events)

    def restart(self, epoch: int, load: Load) -> None:
        """Begin another epoch, a later one: nothing of the last can be resumed, and every subscriber must take a new
        snapshot."""
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} does not follow epoch {self.epoch}")
        self.epoch = epoch
        self.seq = 0
        self.load = load
        self._history.clear()
        self._history_bytes = 0
        for subscriber in tuple(self._subscribers):
            subscriber.drop()

    def publish_load(self, load: Load) -> None:
        """Hand a load report to every subscriber."""
        self.load = load
        if self._subscribers:
            frame = self.load_frame()
            for subscriber in tuple(self._subscribers):
                subscriber.load(frame)

    def load_frame(self) -> bytes:
        """A load report at the present position: also a subscriber's first event, and its sign of life."""
        return sse_frame(self.position, "load", encode_batch(Batch(self.epoch, self.seq, (), self.load)))

    def reset_frame(self) -> bytes:
        """Tells a subscriber that what it knows is incomplete: it must take a snapshot."""
        self.resets += 1
        return sse_frame(self.position, "reset", encode_batch(Batch(self.epoch, self.seq, (), self.load)))

    def subscribe(self, after: tuple[int, int] | None, wake: Callable[[], None]) -> Subscriber | None:
        """A subscriber that gets every batch after the position (epoch, seq); None = from now on.

        Answers None when that position belongs to another epoch, lies in the future or is no longer remembered.
        """
        missed = 0
        if after is not None:
            epoch, seq = after
            missed = self.seq - seq
            if epoch != self.epoch or not 0 <= missed <= len(self._history):
                return None
        subscriber = Subscriber(wake)
        for at in range(len(self._history) - missed, len(self._history)):
            subscriber.batch(self._history[at])
        if subscriber.overrun:
            return None
        subscriber.load(self.load_frame())
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Idempotent."""
        self._subscribers.discard(subscriber)
