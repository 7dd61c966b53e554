"""The agent's view of its engine, and its publication: epochs, batches, load. It does no I/O of its own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvcache.feed import AdaptersChanged, HeldElsewhere, Load, WorkerInfo
from kvcache.images import ImageRule
from kvcache.keys import KEY_SCHEME, BlockKey
from kvcache.ranks import rank_id
from runtime.logs import EventLogger
from worker.agent.core.follower import Follower, Reset
from worker.agent.core.groups import EngineBlocks
from worker.agent.core.load import LoadEstimate, Scrape, has_changed, tier_seconds
from worker.agent.prompts import UNKNOWN_FINGERPRINT
from worker.agent.settings import Settings
from worker.feed.endpoints import CacheState
from worker.feed.log import FeedLog
from worker.feed.publisher import FeedPublisher

logger = EventLogger(__name__)

HARMLESS = frozenset({Reset.CONNECTED, Reset.PROMPTS, Reset.TIERS, Reset.NAMES, Reset.GROUPS})
"""Reasons of an epoch that are no loss."""


class DescriptionError(ValueError):
    """Neither the engine nor the settings state the cache's sizes; the message says what to set."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the feed states of an engine."""

    model: str
    block_size: int
    blocks: int
    engine: int
    """Its number among all engines of the deployment, which its ports follow."""
    ranks: int
    """Data-parallel ranks of its server."""


def describe(scrape: Scrape, settings: Settings, ranks: int) -> Description:
    """The description by the settings, and by the engine where the settings are silent; but an engine that states its
    block size knows it best. Raises `DescriptionError`."""
    block_size = scrape.block_size or settings.block_size
    blocks = settings.blocks or scrape.blocks
    if block_size is None or blocks is None:
        raise DescriptionError(
            "the engine's /metrics do not tell its cache's sizes (vllm:cache_config_info): set AGENT_BLOCK_SIZE and "
            "AGENT_BLOCKS"
        )
    return Description(settings.model or scrape.model, block_size, blocks, scrape.engine, ranks)


def image_rule(settings: Settings) -> ImageRule | None:
    """How the engine reads images, if the settings say it."""
    return None if settings.image_token is None else ImageRule(settings.image_token, settings.image_tokens)


class EngineView:
    """A `CacheSource`: the blocks of a real engine, and the feed that publishes them.

    `worker_id` is the server's, of which the engine is the data-parallel rank `rank`.
    `now` gives microseconds since 1970 (epochs are such numbers), `clock` seconds of the event loop's clock.
    """

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        rank: int = 0,
        *,
        now: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._now = now
        self._load = Load()
        self._estimate = LoadEstimate()
        self._sources: dict[str, str] = {}
        """From where each adapter was last loaded."""
        self.description: Description | None = None
        self.follower = self._new_follower(settings.block_size or 1)
        self.resets: Counter[Reset] = Counter()
        self.feed = FeedLog(now(), self._load)
        self.publisher = FeedPublisher(self.feed, clock)
        info = WorkerInfo(
            worker_id=worker_id,
            epoch=self.feed.epoch,
            model=settings.model or "",
            block_size=0,
            fingerprint=UNKNOWN_FINGERPRINT,
            key_scheme=KEY_SCHEME,
            capacity=0,
            images=image_rule(settings),
            engine=settings.engine_url,
            rank=rank,
            ranks=rank + 1,  # at least; the next scrape tells
            complete=False,
        )
        self.state = CacheState(info, self, self.feed)

    @property
    def engine(self) -> int:
        """Number of the engine, which its ports follow; that of the rank until the engine has been described."""
        return self.state.info.rank if self.description is None else self.description.engine

    def observe(self, scrape: Scrape, ranks: int = 1) -> bool:
        """Take in a scrape of the `/metrics` of a server with so many ranks. True if the engine's description has
        changed: then its events have to be followed anew. Raises `DescriptionError`."""
        description = describe(scrape, self._settings, ranks)
        changed = description != self.description
        if changed:
            self._describe(description)
        self._observe_tiers(scrape, description)
        self._load = self._estimate.load(scrape, description.blocks)
        self.publisher.publish((), self._load)
        return changed

    def _observe_tiers(self, scrape: Scrape, description: Description) -> None:
        settings = self._settings
        seconds = tier_seconds(scrape, description.block_size, settings.cpu_bandwidth, settings.disk_bandwidth)
        if has_changed(self.state.info.tier_seconds, seconds):
            self.state.info = replace(self.state.info, tier_seconds=seconds)
            self._begin_epoch(Reset.TIERS)

    def state_prompts(self, fingerprint: str, max_model_len: int) -> None:
        """Set the fingerprint that routers compare with their tokenizer's, and the longest context in tokens (0: not
        known). A change begins an epoch, so that routers read both again."""
        info = replace(self.state.info, fingerprint=fingerprint, max_model_len=max_model_len)
        if info != self.state.info:
            self.state.info = info
            if self.description is not None:
                self._begin_epoch(Reset.PROMPTS)

    def state_names(self, names: Sequence[str]) -> None:
        """Set the names under which requests may ask for the engine's model. A change begins an epoch."""
        further = tuple(name for name in names if name != self.state.info.model)
        if further != self.state.info.names:
            self.state.info = replace(self.state.info, names=further)
            if self.description is not None:
                self._begin_epoch(Reset.NAMES)

    def state_sources(self, sources: Mapping[str, str]) -> None:
        """From where each loaded adapter comes. vLLM hashes that into the blocks, and its events do not say it: the
        blocks of an adapter that now comes from elsewhere are not reused, and are published as removed."""
        for name, source in sources.items():
            if self._sources.setdefault(name, source) != source:
                self._sources[name] = source
                self.flush()
                if removed := self.follower.blocks.forget(name):
                    self.publisher.publish(removed, self._load)

    def state_adapters(self, names: tuple[str, ...], missing: Mapping[str, str]) -> None:
        """Publish which adapters are loaded, and why others are not, if that is new."""
        if (self.state.info.adapters, self.state.info.missing_adapters) == (names, missing):
            return
        self.state.info = replace(self.state.info, adapters=names, missing_adapters=missing)
        self.publisher.publish((AdaptersChanged(names, missing),), self._load)

    def flush(self) -> None:
        """Publish what the follower has learned since the last call."""
        update = self.follower.take()
        if self.state.info.complete is not self.follower.complete:
            self.state.info = replace(self.state.info, complete=self.follower.complete)
        regrouped = self._regroup()
        if update.reset is not None or regrouped:
            self._begin_epoch(update.reset or Reset.GROUPS)
        elif update.events:
            self.publisher.publish(update.events, self._load)

    def _regroup(self) -> bool:
        """State the groups that the engine's events show. Whether they are others than stated so far."""
        blocks, info = self.follower.blocks, self.state.info
        if self.description is None or (info.block_size, info.groups) == (blocks.block_size, blocks.groups):
            return False
        self.state.info = replace(info, block_size=blocks.block_size, groups=blocks.groups)
        return True

    def load(self) -> Load:
        """The load as of the last scrape."""
        return self._load

    def blocks(self) -> Iterable[tuple[BlockKey, BlockKey | None]]:
        return self.follower.blocks.blocks()

    def elsewhere(self) -> Iterable[HeldElsewhere]:
        return self.follower.blocks.elsewhere()

    def _describe(self, description: Description) -> None:
        self.description = description
        self.follower = self._new_follower(description.block_size)
        self.state.info = replace(
            self.state.info,
            worker_id=rank_id(self._worker_id, self.state.info.rank, description.ranks),
            ranks=description.ranks,
            model=description.model,
            block_size=description.block_size,
            capacity=description.blocks,
        )

    def _new_follower(self, block_size: int) -> Follower:
        return Follower(EngineBlocks(block_size), can_replay=bool(self._settings.replay_endpoint))

    def _begin_epoch(self, why: Reset) -> None:
        self.resets[why] += 1
        epoch = max(self._now(), self.feed.epoch + 1)
        self.feed.restart(epoch, self._load)
        self.state.info = replace(self.state.info, epoch=epoch)
        logger.log(
            logging.INFO if why in HARMLESS else logging.WARNING,
            "epoch_began",
            epoch=epoch,
            why=why.value,
            blocks=self.follower.blocks.physical,
            complete=self.follower.complete,
        )
