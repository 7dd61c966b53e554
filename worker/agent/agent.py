"""The agent's two loops: one polls the engine's health and metrics, the other follows its KV events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum, auto

import zmq.asyncio

from runtime.backoff import Backoff
from runtime.logs import EventLogger
from worker.addresses import default_worker_id
from worker.agent.core.load import Scrape
from worker.agent.engine import EngineClient, EngineError, engine_client
from worker.agent.prompts import (
    AGREEMENT_TRANSITIONS,
    UNKNOWN_FINGERPRINT,
    Agreement,
    AgreementEvent,
    Comparison,
    Expected,
    compare,
)
from worker.agent.settings import Settings
from worker.agent.subscription import ReplayError, Subscription, replay
from worker.agent.view import DescriptionError, EngineView
from worker.feed.endpoints import FeedEndpoints

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

TOKENIZER_BACKOFF = Backoff(2.0, 60.0)
"""Between attempts to load the tokenizer."""

_PROMPTS_PENDING = {
    Agreement.LOADING: "the tokenizer is being loaded",
    Agreement.PENDING: "its prompts have not been compared with the tokenizer's yet",
}
_LOGGED = {
    Agreement.EQUAL: ("prompts_agree", logging.INFO),
    Agreement.DIFFERENT: ("prompts_differ", logging.ERROR),
    Agreement.UNCHECKED: ("prompts_unchecked", logging.WARNING),
    Agreement.UNLOADABLE: ("tokenizer_failed", logging.ERROR),
}
"""Log event and level of each outcome."""


class FollowState(Enum):
    """How far the agent follows the engine's events."""

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


class Agent:
    """All parts of one agent, wired together. Must be made inside the event loop."""

    def __init__(
        self,
        settings: Settings,
        expected: Callable[[], Expected],
        port: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._load = expected
        self._expected: Expected | None = None
        self.agreement = Agreement.LOADING
        """Whether the engine's prompts equal those of `expected`, which is called in a thread until it succeeds."""
        self.clock = clock
        self.view = EngineView(
            settings,
            settings.worker_id or default_worker_id(settings.host, port),
            now=lambda: time.time_ns() // 1000,
            clock=clock,
        )
        self.endpoints = FeedEndpoints(self.view.state, self.view.feed, self.view.publisher)
        self.engine_problem = f"{settings.engine_url} has not answered yet"
        """Why the engine cannot be used; "" when it can."""
        self.follow_state = FollowState.DISCONNECTED
        self._unsubscribed = f"not subscribed to {settings.events_endpoint} yet"
        self._not_followed = self._unsubscribed
        """Why the events are not followed, if they are not."""
        self.replays: Counter[str] = Counter()
        self.last_event_at: float | None = None
        self._following: asyncio.Task[None] | None = None
        self._context = zmq.asyncio.Context(io_threads=1)
        self._stopped = False
        self._refresh()

    @property
    def events_problem(self) -> str:
        """Why the engine's events are not followed; "" when they are."""
        return "" if self.follow_state is FollowState.FOLLOWING else self._not_followed

    @property
    def problem(self) -> str:
        """Why the feed is not served; "" when it is."""
        return self.engine_problem or self.events_problem or _PROMPTS_PENDING.get(self.agreement, "")

    async def run(self) -> None:
        """Poll the engine and follow its events until cancelled."""
        async with engine_client(self.settings.engine_url) as client, asyncio.TaskGroup() as group:
            group.create_task(self._load_prompts())
            await self._poll(client, group)

    def stop_serving(self) -> None:
        """End every feed stream, for good: the process is about to end."""
        self._stopped = True
        self.endpoints.close()

    def close(self) -> None:
        """Stop the timers and close the sockets."""
        self.view.publisher.close()
        self._context.destroy(linger=0)

    # --- the engine -------------------------------------------------------------------------------------

    async def _poll(self, client: EngineClient, group: asyncio.TaskGroup) -> None:
        while True:
            started = self.clock()
            try:
                self._scraped(await client.scrape(), group)
                if self.agreement is Agreement.PENDING and self._expected is not None:
                    self._compared(await compare(client, self._expected))
            except (EngineError, DescriptionError) as error:
                self._set_engine_problem(str(error))
            await asyncio.sleep(max(started + self.settings.poll_interval - self.clock(), 0.0))

    def _scraped(self, scrape: Scrape, group: asyncio.TaskGroup) -> None:
        if self.view.observe(scrape):
            if scrape.engines > 1:
                logger.error("several_engines", engines=scrape.engines, followed=1)
            if self._following is not None:
                self._following.cancel()
            self._advance_following(FollowEvent.LOST, self._unsubscribed)
            self._following = group.create_task(self._follow(self._following))
        self._set_engine_problem("")

    # --- its prompts ------------------------------------------------------------------------------------

    async def _load_prompts(self) -> None:
        """Load the tokenizer and retry until that works: the hub may be unreachable, or a volume filled late."""
        failures = 0
        while self._expected is None:
            try:
                self._expected = await asyncio.to_thread(self._load)
            except Exception as error:  # noqa: BLE001  # hubs, proxies and parsers fail in ways of their own
                self._compared(Comparison(AgreementEvent.LOAD_FAILED, UNKNOWN_FINGERPRINT, str(error) or repr(error)))
                failures += 1
                await asyncio.sleep(TOKENIZER_BACKOFF.delay(failures))
        self._advance_agreement(AgreementEvent.LOADED)
        self._refresh()

    def _compared(self, comparison: Comparison) -> None:
        before = self.agreement
        self.view.state_prompts(comparison.fingerprint, comparison.max_model_len)
        self._advance_agreement(comparison.outcome)
        if self.agreement is not before:
            name, level = _LOGGED[self.agreement]
            why = {"why": comparison.why} if comparison.why else {}
            logger.log(level, name, tokenizer=self.settings.tokenizer, **why)
        self._refresh()

    def _advance_agreement(self, event: AgreementEvent) -> None:
        """The one place where the agreement changes."""
        self.agreement = AGREEMENT_TRANSITIONS[self.agreement][event]

    # --- its events -------------------------------------------------------------------------------------

    async def _follow(self, before: asyncio.Task[None] | None) -> None:
        """Subscribe, and subscribe anew whenever the connection ends. `before` is the task that followed the engine
        under its previous description."""
        if before is not None:
            await asyncio.wait([before])
            self._advance_following(FollowEvent.LOST, self._unsubscribed)  # `before` may have connected meanwhile
        while True:
            subscription = Subscription(self._context, self.settings.events_endpoint, self.settings.topic)
            try:
                await subscription.connected()
                # The end of the connection is not raised as an exception: if the task group failed in the same turn of
                # the loop in which this task is cancelled, the cancellation would be lost (before Python 3.13).
                async with asyncio.TaskGroup() as group:
                    reading = group.create_task(self._read(subscription))
                    await subscription.disconnected()
                    reading.cancel()
                self._advance_following(FollowEvent.LOST, f"the connection to {self.settings.events_endpoint} ended")
            finally:
                subscription.close()
            await asyncio.sleep(RESUBSCRIBE)

    async def _read(self, subscription: Subscription) -> None:
        follower, view = self.view.follower, self.view
        self._advance_following(FollowEvent.CONNECTED)
        follower.begin()
        answers = await self._catch_up()
        view.flush()
        self._advance_following(FollowEvent.CAUGHT_UP)
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
                self.last_event_at = self.clock()
                taken += 1
            view.flush()
            if taken % BATCHES_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _catch_up(self) -> bool:
        """Ask for the missing batches and apply them. False if the engine does not answer, or every answer is torn."""
        endpoint = self.settings.replay_endpoint
        follower = self.view.follower
        for _ in range(REPLAY_ATTEMPTS if endpoint else 0):
            answered = 0
            try:
                async with replay(self._context, endpoint, follower.history_begin()) as answers:
                    async for message in answers:
                        follower.history(*message)
                        self.last_event_at = self.clock()
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

    # --- health -----------------------------------------------------------------------------------------

    def _set_engine_problem(self, problem: str) -> None:
        if problem != self.engine_problem:
            _log("engine_reached", "engine_unusable", problem)
        if problem:
            self._advance_agreement(AgreementEvent.ENGINE_LOST)
        self.engine_problem = problem
        self._refresh()

    def _advance_following(self, event: FollowEvent, why: str = "") -> None:
        """The one place where the state of following changes. `why`: the reason of a loss."""
        before = self.events_problem
        self.follow_state = FOLLOW_TRANSITIONS.get((self.follow_state, event), self.follow_state)
        if event is FollowEvent.LOST:
            self._not_followed = why
            self._advance_agreement(AgreementEvent.ENGINE_LOST)
        if self.events_problem != before:
            _log("events_followed", "events_not_followed", self.events_problem)
        self._refresh()

    def _refresh(self) -> None:
        if self._stopped:
            return
        if self.problem:
            self.endpoints.close(self.problem)
        else:
            self.endpoints.open()


def _log(well: str, badly: str, problem: str) -> None:
    if problem:
        logger.warning(badly, why=problem)
    else:
        logger.info(well)
