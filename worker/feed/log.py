"""The log of the cache feed: it numbers the engine's changes, keeps the last of them and hands them to subscribers.

It knows no sockets or clocks. The emulator or the agent publishes through `worker.feed.publisher`,
`worker.feed.endpoints` streams to routers and `worker.feed.push` pushes to them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvcache.feed import Batch, Event, Load, encode_batch, encode_position

HISTORY_BATCHES = 8192
HISTORY_BYTES = 4 * 2**20
"""How much is kept for subscribers that resume. One that has missed more needs a new snapshot."""

SUBSCRIBER_BYTES = 2**20
"""What may wait for a slow subscriber before it is dropped."""


def sse_frame(position: str, name: str, data: bytes) -> bytes:
    """One server-sent event, ready to be sent."""
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (position.encode(), name.encode(), data)


class Subscriber:
    """The bounded queue of one reader of the feed. Of load reports only the newest waits."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._frames: list[bytes] = []
        self._bytes = 0
        self._load: bytes | None = None
        self.overrun = False
        """The queue was dropped and the reader needs a new snapshot: it read too slowly, or the epoch ended."""

    def batch(self, frame: bytes) -> None:
        """Queue a batch. A waiting load report is older than the batch's own load, and is dropped."""
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
        """Drop the queue: the reader needs a new snapshot."""
        self.overrun = True
        self._frames.clear()
        self._load = None
        self._wake()

    def load(self, frame: bytes) -> None:
        """Queue a load report in place of the one that waits."""
        if not self.overrun:
            self._load = frame
            self._wake()

    def take(self) -> bytes:
        """Take everything that waits, in order."""
        if self._load is not None:
            self._frames.append(self._load)
            self._load = None
        taken = b"".join(self._frames)
        self._frames.clear()
        self._bytes = 0
        return taken


class FeedLog:
    """The batches of the present epoch. `seq`: number of the last batch. `load`: the last load published."""

    def __init__(self, epoch: int, load: Load) -> None:
        self.epoch = epoch
        self.seq = 0
        self.load = load
        self.resets = 0
        """How often a subscriber was told to take a new snapshot."""
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
        """Number a batch, keep it and hand it to every subscriber."""
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
        """Begin a later epoch: nothing of the last one can be resumed, and every subscriber needs a new snapshot.

        Raises `ValueError` if `epoch` is not later.
        """
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
        """A load report at the present position. It is also a subscriber's first event and its keep-alive."""
        return sse_frame(self.position, "load", encode_batch(Batch(self.epoch, self.seq, (), self.load)))

    def reset_frame(self) -> bytes:
        """The event that tells a subscriber to take a new snapshot."""
        self.resets += 1
        return sse_frame(self.position, "reset", encode_batch(Batch(self.epoch, self.seq, (), self.load)))

    def subscribe(self, after: tuple[int, int] | None, wake: Callable[[], None]) -> Subscriber | None:
        """A subscriber that gets every batch after the position `after` (epoch, seq), or from now on if that is None.

        None if the position belongs to another epoch, lies in the future or is no longer kept.
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
        """Remove the subscriber. Idempotent."""
        self._subscribers.discard(subscriber)
