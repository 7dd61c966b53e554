"""Follows the KV events of one engine: the only one of a server, or one of its data-parallel ranks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum, auto

import zmq.asyncio

from runtime.logs import EventLogger
from worker.agent.core.load import Scrape
from worker.agent.settings import Settings
from worker.agent.subscription import ReplayError, Subscription, replay
from worker.agent.view import EngineView
from worker.feed.endpoints import FeedEndpoints
from worker.kv_events import rank_endpoint

logger = EventLogger(__name__)

EVENT_TIMEOUT = 5.0
"""Seconds without an event after which the agent asks for missed ones: the loss of the last event shows in no other
way."""

RESUBSCRIBE = 0.5
"""Seconds between the end of a connection and the next attempt, so that an engine that closes each at once costs
little."""

REPLAY_ATTEMPTS = 20
"""Torn replays after which the missing batches are given up."""

BATCHES_PER_TURN = 64
"""Batches that are applied before other tasks of the event loop run."""


class FollowState(Enum):
    """How far the agent follows an engine's events."""

    DISCONNECTED = auto()
    CATCHING_UP = auto()
    """Subscribed; the batches published before are being replayed."""
    FOLLOWING = auto()


class FollowEvent(Enum):
    """What changes how far the agent follows."""

    CONNECTED = auto()
    CAUGHT_UP = auto()
    LOST = auto()
    """The connection ended, or the engine has another description than before."""


FOLLOW_TRANSITIONS: Mapping[tuple[FollowState, FollowEvent], FollowState] = {
    (FollowState.DISCONNECTED, FollowEvent.CONNECTED): FollowState.CATCHING_UP,
    (FollowState.CATCHING_UP, FollowEvent.CAUGHT_UP): FollowState.FOLLOWING,
    **{(state, FollowEvent.LOST): FollowState.DISCONNECTED for state in FollowState},
}
"""What is not listed changes nothing. A task that is cancelled, because the engine's description has changed, may still
connect or catch up before the cancellation reaches it."""

REPLAY_OUTCOMES = ("complete", "torn", "unanswered")


class RankFollower:
    """One engine's view, and the connection that keeps it up to date.

    `on_change` is called whenever `problem` may have changed, and before it `on_lost` if the engine was lost.
    """

    def __init__(
        self,
        settings: Settings,
        view: EngineView,
        context: zmq.asyncio.Context,
        clock: Callable[[], float],
        *,
        on_change: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.view = view
        self.endpoints = FeedEndpoints(view.state, view.feed, view.publisher)
        self.follow_state = FollowState.DISCONNECTED
        self.replays: Counter[str] = Counter()
        self.last_event_at: float | None = None
        self._settings = settings
        self._context = context
        self._clock = clock
        self._on_change = on_change
        self._on_lost = on_lost
        self._not_followed = self._unsubscribed
        """Why the events are not followed, if they are not."""
        self._following: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str:
        """Why the engine's events are not followed; "" when they are."""
        return "" if self.follow_state is FollowState.FOLLOWING else self._not_followed

    def observe(self, scrape: Scrape, ranks: int, group: asyncio.TaskGroup) -> None:
        """Take in a scrape of one of `ranks` engines, and follow its events, anew if it is another engine than before.
        Raises `DescriptionError`."""
        if not self.view.observe(scrape, ranks):
            return
        if self._following is not None:
            self._following.cancel()
        self._advance(FollowEvent.LOST, self._unsubscribed)
        self._following = group.create_task(self._follow(self._following))

    def close(self) -> None:
        """The engine has no such rank any more, or the process ends."""
        if self._following is not None:
            self._following.cancel()
        self.view.publisher.close()

    @property
    def _events(self) -> str:
        return rank_endpoint(self._settings.events_endpoint, self.view.engine)

    @property
    def _replays_from(self) -> str:
        endpoint = self._settings.replay_endpoint
        return rank_endpoint(endpoint, self.view.engine) if endpoint else ""

    @property
    def _unsubscribed(self) -> str:
        return f"not subscribed to {self._events} yet"

    async def _follow(self, before: asyncio.Task[None] | None) -> None:
        """Subscribe, and subscribe anew whenever the connection ends. `before` is the task that followed the engine
        under its previous description."""
        if before is not None:
            await asyncio.wait([before])
            self._advance(FollowEvent.LOST, self._unsubscribed)  # `before` may have connected meanwhile
        while True:
            subscription = Subscription(self._context, self._events, self._settings.topic)
            try:
                await subscription.connected()
                # The end of the connection is not raised as an exception: if the task group failed in the same turn of
                # the loop in which this task is cancelled, the cancellation would be lost (before Python 3.13).
                async with asyncio.TaskGroup() as group:
                    reading = group.create_task(self._read(subscription))
                    await subscription.disconnected()
                    reading.cancel()
                self._advance(FollowEvent.LOST, f"the connection to {self._events} ended")
            finally:
                subscription.close()
            await asyncio.sleep(RESUBSCRIBE)

    async def _read(self, subscription: Subscription) -> None:
        follower, view = self.view.follower, self.view
        self._advance(FollowEvent.CONNECTED)
        follower.begin()
        answers = await self._catch_up()
        view.flush()
        self._advance(FollowEvent.CAUGHT_UP)
        taken = 0
        while True:
            message = await subscription.receive(EVENT_TIMEOUT)
            if message is None:
                answers = answers and await self._catch_up()
            else:
                while not follower.live(*message):
                    missing = follower.next
                    answers = await self._catch_up()
                    if follower.next == missing:
                        follower.live(*message, last_resort=True)
                        break
                self.last_event_at = self._clock()
                taken += 1
            view.flush()
            if taken % BATCHES_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _catch_up(self) -> bool:
        """Ask for the missing batches and apply them. False if the engine does not answer, or every answer is torn."""
        endpoint = self._replays_from
        follower = self.view.follower
        for _ in range(REPLAY_ATTEMPTS if endpoint else 0):
            answered = 0
            try:
                async with replay(self._context, endpoint, follower.history_begin()) as answers:
                    async for message in answers:
                        follower.history(*message)
                        self.last_event_at = self._clock()
                        answered += 1
                        if answered % BATCHES_PER_TURN == 0:
                            await asyncio.sleep(0)
            except ReplayError:
                if not answered:
                    self.replays["unanswered"] += 1
                    logger.warning("replay_unanswered", endpoint=endpoint)
                    return False
            else:
                if follower.history_end():
                    self.replays["complete"] += 1
                    return True
            self.replays["torn"] += 1
        return False

    def _advance(self, event: FollowEvent, why: str = "") -> None:
        """The one place where the state of following changes. `why`: the reason of a loss."""
        before = self.problem
        self.follow_state = FOLLOW_TRANSITIONS.get((self.follow_state, event), self.follow_state)
        if event is FollowEvent.LOST:
            self._not_followed = why
            self._on_lost()
        if self.problem != before:
            if self.problem:
                logger.warning("events_not_followed", why=self.problem)
            else:
                logger.info("events_followed", endpoint=self._events)
        self._on_change()
