"""The agent: it polls the engine's health and metrics, and follows the KV events of each of its data-parallel ranks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import zmq.asyncio

from runtime.backoff import Backoff
from runtime.logs import EventLogger
from worker.addresses import default_worker_id
from worker.agent.core.load import Scrape
from worker.agent.engine import AdapterLoader, EngineClient, EngineError, Models, engine_client
from worker.agent.prompts import (
    AGREEMENT_TRANSITIONS,
    UNKNOWN_FINGERPRINT,
    Agreement,
    AgreementEvent,
    Comparison,
    Expected,
    compare,
)
from worker.agent.rank import RankFollower
from worker.agent.settings import Settings
from worker.agent.view import DescriptionError, EngineView
from worker.feed.endpoints import FeedEndpoints
from worker.feed.ranks import RankedFeed
from worker.lora.keeper import AdapterKeeper

logger = EventLogger(__name__)

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
        self.worker_id = settings.worker_id or default_worker_id(settings.host, port)
        self._context = zmq.asyncio.Context(io_threads=1)
        self.ranks: list[RankFollower] = []
        """The engine's data-parallel ranks, at least one."""
        self._feeds: list[FeedEndpoints] = []
        self.feed = RankedFeed(self._feeds)
        self.keeper = AdapterKeeper(
            settings.adapters_file, AdapterLoader(settings.engine_url), self._adapters_changed, clock
        )
        self.engine_problem = f"{settings.engine_url} has not answered yet"
        """Why the engine cannot be used; "" when it can."""
        self._stopped = False
        self._add_rank()
        self._refresh()

    @property
    def events_problem(self) -> str:
        """Why the events of an engine are not followed; "" when those of every rank are."""
        for number, rank in enumerate(self.ranks):
            if rank.problem:
                return f"rank {number}: {rank.problem}" if len(self.ranks) > 1 else rank.problem
        return ""

    @property
    def complete(self) -> bool:
        """Whether every block of every rank was seen being stored."""
        return all(rank.view.follower.complete for rank in self.ranks)

    @property
    def problem(self) -> str:
        """Why the feed is not served; "" when it is. The feeds of all ranks are served, or none."""
        return self.engine_problem or self.events_problem or _PROMPTS_PENDING.get(self.agreement, "")

    async def run(self) -> None:
        """Poll the engine and follow its events until cancelled."""
        async with engine_client(self.settings.engine_url) as client, asyncio.TaskGroup() as group:
            group.create_task(self._load_prompts())
            group.create_task(self.keeper.run())
            await self._poll(client, group)

    def stop_serving(self) -> None:
        """End every feed stream, for good: the process is about to end."""
        self._stopped = True
        self.feed.close()

    def close(self) -> None:
        """Stop the timers and close the sockets."""
        for rank in self.ranks:
            rank.close()
        self._context.destroy(linger=0)

    # --- the engine -------------------------------------------------------------------------------------

    async def _poll(self, client: EngineClient, group: asyncio.TaskGroup) -> None:
        while True:
            started = self.clock()
            try:
                scrapes, models = await client.scrape(), await client.models()
                self._scraped(scrapes, models.names, group)
                self._listed(models)
                if self.agreement is Agreement.PENDING and self._expected is not None:
                    self._compared(await compare(client, self._expected))
            except (EngineError, DescriptionError) as error:
                self._set_engine_problem(str(error))
            await asyncio.sleep(max(started + self.settings.poll_interval - self.clock(), 0.0))

    def _scraped(self, scrapes: Sequence[Scrape], names: Sequence[str], group: asyncio.TaskGroup) -> None:
        """Take in a scrape of each rank, and the names of the model. Raises `DescriptionError`."""
        wanted = self.settings.data_parallel_size
        if wanted is not None and len(scrapes) != wanted:
            named = ", ".join(str(scrape.engine) for scrape in scrapes)
            raise DescriptionError(
                f"the engine's /metrics are about engine {named}, but AGENT_DATA_PARALLEL_SIZE says that there are "
                f"{wanted}: set it to vLLM's --data-parallel-size, or leave it out"
            )
        while len(self.ranks) < len(scrapes):
            self._add_rank()
        while len(self.ranks) > len(scrapes):
            self._feeds.pop().close()
            self.ranks.pop().close()
        for rank, scrape in zip(self.ranks, scrapes, strict=True):
            rank.view.state_names(names)
            rank.observe(scrape, len(scrapes), group)
        self._set_engine_problem("")

    def _listed(self, models: Models) -> None:
        """Take in which adapters the engine has. All ranks have the same."""
        for rank in self.ranks:
            rank.view.state_sources(models.adapters)
        self.keeper.observe(models.adapters)
        self._adapters_changed(*self.keeper.state)  # of which a rank that is new has not been told

    def _adapters_changed(self, names: tuple[str, ...], missing: Mapping[str, str]) -> None:
        for rank in self.ranks:
            rank.view.state_adapters(names, missing)

    def _add_rank(self) -> None:
        view = EngineView(
            self.settings,
            self.worker_id,
            len(self.ranks),
            now=lambda: time.time_ns() // 1000,
            clock=self.clock,
        )
        rank = RankFollower(
            self.settings,
            view,
            self._context,
            self.clock,
            on_change=self._refresh,
            on_lost=lambda: self._advance_agreement(AgreementEvent.ENGINE_LOST),
        )
        self.ranks.append(rank)
        self._feeds.append(rank.endpoints)

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
        for rank in self.ranks:
            rank.view.state_prompts(comparison.fingerprint, comparison.max_model_len)
        self._advance_agreement(comparison.outcome)
        if self.agreement is not before:
            name, level = _LOGGED[self.agreement]
            why = {"why": comparison.why} if comparison.why else {}
            logger.log(level, name, tokenizer=self.settings.tokenizer, **why)
        self._refresh()

    def _advance_agreement(self, event: AgreementEvent) -> None:
        """The one place where the agreement changes."""
        self.agreement = AGREEMENT_TRANSITIONS[self.agreement][event]

    # --- health -----------------------------------------------------------------------------------------

    def _set_engine_problem(self, problem: str) -> None:
        if problem and problem != self.engine_problem:
            logger.warning("engine_unusable", why=problem)
        elif self.engine_problem and not problem:
            logger.info("engine_reached", ranks=len(self.ranks))
        if problem:
            self._advance_agreement(AgreementEvent.ENGINE_LOST)
        self.engine_problem = problem
        self._refresh()

    def _refresh(self) -> None:
        if self._stopped:
            return
        if self.problem:
            self.feed.close(self.problem)
        else:
            self.feed.open()
