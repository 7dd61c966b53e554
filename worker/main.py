"""`python -m worker.main`: an emulated engine, or several data-parallel ones, behind vLLM's HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from kvcache.feed import Tier, WorkerInfo
from kvcache.images import ImageRule
from kvcache.keys import KEY_SCHEME
from kvcache.ranks import rank_id
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from runtime.draining import Drain, DrainPolicy
from runtime.http.server import HttpLimits, HttpServer
from runtime.logs import EventLogger, configure
from runtime.process import EXIT_FAILED, exit_code, freeze_startup_objects, report_crash, run
from runtime.settings import SettingsError
from runtime.sockets import inherited, listen
from worker.addresses import advertised_url, default_worker_id
from worker.asgi import Exposition, process_metrics
from worker.emulator.adapters import Adapter, AdapterLoader, Adapters, load_modules
from worker.emulator.data_parallel import DataParallelEngines
from worker.emulator.engine.config import EngineConfig, EngineConfigError
from worker.emulator.engine.engine import Engine
from worker.emulator.generators import GeneratorError, make_generator
from worker.emulator.generators.base import Generator
from worker.emulator.metrics import EngineCollector, WorkerCollector, WorkerCounts, cache_config
from worker.emulator.rank import Rank
from worker.emulator.server.app import App
from worker.emulator.server.service import EmulatorEvent, EmulatorState, Service
from worker.emulator.timer import LoopTimer, TimerFactory, precise_timer
from worker.feed.ranks import RankedFeed
from worker.kv_events import EndpointError, WireFormat
from worker.lora.keeper import AdapterKeeper
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.emulator.kv_events.publisher import KVEventsPublisher

logger = EventLogger("worker")

ADAPTERS_INTERVAL = 1.0
"""Seconds between two looks at the adapters' file."""
SHUTDOWN_MARGIN = 2.0
"""Seconds for the answers that the end of the grace period cut short to reach their clients."""


class Worker:
    """All parts of one worker process, wired together. Must be made inside the event loop."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        generator: Generator,
        port: int,
        clock: Callable[[], float] = time.monotonic,
        timer: TimerFactory = LoopTimer,
    ) -> None:
        gpu = settings.gpu
        self.epoch = time.time_ns() // 1000
        max_model_len = settings.model_len()
        block_bytes = gpu.geometry.bytes_per_block(settings.block_size)
        config = engine_config(settings, tokenizer)
        images = image_rule(settings, tokenizer)
        self.adapters = Adapters(settings.served_models, settings.max_lora_rank if settings.enable_lora else None)
        self.info = WorkerInfo(
            worker_id=settings.worker_id or default_worker_id(settings.host, port),
            epoch=self.epoch,
            model=settings.served_model,
            block_size=settings.block_size,
            fingerprint=tokenizer.fingerprint,
            key_scheme=KEY_SCHEME,
            capacity=settings.usable_blocks,
            max_model_len=max_model_len,
            names=settings.served_models[1:],
            ranks=settings.data_parallel_size,
            tier_seconds={Tier.CPU: settings.cpu_block_seconds} if settings.cpu_blocks else {},
            groups=config.groups,
            images=images,
        )
        self.ranks = [
            Rank(
                of_rank(self.info, number),
                Engine(config, gpu.latency.scaled(settings.speed)),
                kv_events_publisher(settings, self.adapters.known, number),
                clock=clock,
                timer=timer,
            )
            for number in range(settings.data_parallel_size)
        ]
        self.engines = DataParallelEngines(self.ranks)
        self.keeper = AdapterKeeper(settings.adapters_file, AdapterLoader(self.adapters), self._adapters_changed, clock)
        self.service = Service(
            model=settings.served_model,
            root=gpu.model,
            names=settings.served_models,
            tokenizer=tokenizer,
            generator=generator,
            engines=self.engines,
            adapters=self.adapters,
            block_size=settings.block_size,
            max_model_len=max_model_len,
            images=images,
            prompt_tokens_details=settings.enable_prompt_tokens_details,
            request_id_headers=settings.enable_request_id_headers,
            dev_mode=settings.dev_mode,
            runtime_lora=settings.allow_runtime_lora_updating,
            auto_tool_choice=settings.enable_auto_tool_choice,
            store_responses=settings.enable_responses_store,
            trust_request_chat_template=settings.trust_request_chat_template,
        )
        self.feed = RankedFeed([rank.endpoints for rank in self.ranks])
        self.push_failures: Callable[[], int] = lambda: 0
        registry = CollectorRegistry()
        process_metrics(registry)
        caches = cache_config(
            block_size=settings.block_size,
            blocks=settings.usable_blocks,
            max_model_len=max_model_len,
            prefix_caching=settings.enable_prefix_caching,
            block_bytes=block_bytes,
            cpu_blocks=settings.cpu_blocks,
            ranks=settings.data_parallel_size,
        )
        registry.register(
            WorkerCollector(
                [
                    EngineCollector(rank.engine, rank.metrics, settings.served_model, caches, block_bytes, number)
                    for number, rank in enumerate(self.ranks)
                ],
                [rank.feed for rank in self.ranks],
                WorkerCounts(
                    push_failures=lambda: self.push_failures(),
                    draining=lambda: self.service.state is not EmulatorState.SERVING,
                ),
            )
        )
        sources = {
            str(number): rank.kv_events.config.model_dump()
            for number, rank in enumerate(self.ranks)
            if rank.kv_events is not None
        }
        self.adapters.on_change = lambda: self.keeper.observe(self.adapters.paths())
        load_modules(self.adapters, settings.lora_modules)
        self.app = App(self.service, self.feed, Exposition(registry), sources)

    def _adapters_changed(self, names: tuple[str, ...], missing: Mapping[str, str]) -> None:
        for rank in self.ranks:
            rank.adapters_changed(names, missing)

    async def load_adapters(self) -> None:
        """Load those of the adapters' file that are not loaded, and unload what it does not list."""
        self.keeper.observe(self.adapters.paths())
        await self.keeper.act()

    async def keep_adapters(self) -> None:
        """Do so again and again, until cancelled."""
        while True:
            await asyncio.sleep(ADAPTERS_INTERVAL)
            await self.load_adapters()

    async def drain(self, limit: float, cut_short: asyncio.Event) -> None:
        """Go on serving until requests stop coming, for `limit` seconds at most: this may be the last worker.

        The feed's streams end, so that routers ask /health and learn from it to prefer other workers.
        """
        self.service.advance(EmulatorEvent.DRAIN)
        self.feed.drop()
        drain = Drain(DrainPolicy(0.0, limit), time.monotonic, last_request=lambda: self.service.last_request)
        await drain.wait(cut_short)

    async def finish_requests(self, grace: float) -> bool:
        """Refuse new requests and let those in flight finish. Those left after `grace` seconds end with "abort".

        The feed ends at once: a router that loses it asks /health, and learns that this worker closes.
        True if no request was aborted.
        """
        self.service.advance(EmulatorEvent.CLOSE)
        self.feed.close()
        try:
            async with asyncio.timeout(grace):
                await self.service.idle.wait()
        except TimeoutError:
            self.engines.abort_all()
            return False
        return True

    async def died(self) -> None:
        """Wait until an engine has failed. The requests of the others end with it, as the process does."""
        await _first(*(rank.async_engine.dead for rank in self.ranks))
        for rank in self.ranks:
            rank.async_engine.die()

    def close(self) -> None:
        """Stop the timers and threads."""
        for rank in self.ranks:
            rank.close()
        self.service.close()


async def push(worker: Worker, settings: Settings, port: int) -> None:
    """Push to every router that the settings name, until cancelled."""
    if not settings.router_url:
        return
    from worker.feed.push import Pusher, posting_to  # aiohttp: half the start-up time of a worker

    pushers = [
        Pusher(url, settings.advertise_url or advertised_url(settings.host, port, url), rank.state, rank.feed)
        for url in settings.router_url
        for rank in worker.ranks
    ]
    worker.push_failures = lambda: sum(pusher.failures for pusher in pushers)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for pusher in pushers:
            group.create_task(
                pusher.run(await stack.enter_async_context(posting_to(pusher.router_url, settings.router_token_file)))
            )


def of_rank(info: WorkerInfo, rank: int) -> WorkerInfo:
    """What the feed of one data-parallel rank states of a worker."""
    return replace(info, worker_id=rank_id(info.worker_id, rank, info.ranks), rank=rank)


def kv_events_publisher(settings: Settings, adapters: Mapping[str, Adapter], rank: int) -> KVEventsPublisher | None:
    """The publisher of one rank's KV events in vLLM's form, if the settings ask for it. Raises `EndpointError`."""
    config = settings.published_kv_events
    if config is None:
        return None
    from worker.emulator.kv_events.encoding import DEFAULT_SEED, CacheGroup, VllmEvents
    from worker.emulator.kv_events.publisher import KVEventsPublisher  # ZMQ: only where it is used

    seed = os.environ.get("PYTHONHASHSEED", DEFAULT_SEED)
    window, sliding = settings.window_and_groups
    groups = [CacheGroup(), *[CacheGroup("sliding_window", window)] * sliding]
    events = VllmEvents(WireFormat(settings.kv_events_format), adapters, groups, seed)
    return KVEventsPublisher(config, events, time.time, rank)


def image_rule(settings: Settings, tokenizer: Tokenizer) -> ImageRule | None:
    """How images are read, if they are. Raises `SettingsError`."""
    if not settings.image_tokens:
        return None
    ids = tokenizer.encode(settings.image_token, add_special_tokens=False)
    if len(ids) != 1:
        raise SettingsError(f"--image-token {settings.image_token!r} is {len(ids)} tokens of this tokenizer, not one")
    return ImageRule(ids[0], settings.image_tokens, hashes_bytes=True)


def engine_config(settings: Settings, tokenizer: Tokenizer) -> EngineConfig:
    """The engine's configuration. Raises `SettingsError` and `EngineConfigError`."""
    gpu = settings.gpu
    window, groups = settings.window_and_groups
    return EngineConfig(
        block_size=settings.block_size,
        blocks=settings.usable_blocks,
        max_num_batched_tokens=settings.max_num_batched_tokens or gpu.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs or gpu.max_num_seqs,
        max_model_len=settings.model_len(),
        eos_token_id=tokenizer.eos_token_id,
        enable_prefix_caching=settings.enable_prefix_caching,
        max_loras=settings.max_loras if settings.enable_lora else 0,
        cpu_blocks=settings.cpu_blocks,
        cpu_block_seconds=settings.cpu_block_seconds,
        sliding_window=window,
        sliding_groups=groups,
    )


async def serve(settings: Settings, tokenizer: Tokenizer, generator: Generator, stop: asyncio.Event) -> int:
    """Run one worker until `stop` is set, then drain it. Returns the process's exit code."""
    started = time.monotonic()
    sock = inherited(settings.fd) if settings.fd is not None else listen(settings.host, settings.port)
    worker = Worker(settings, tokenizer, generator, sock.getsockname()[1], timer=precise_timer())
    limits = HttpLimits(max_concurrent_requests=settings.max_concurrent_requests)
    server = HttpServer(worker.app, sock, limits, cancel_on_disconnect=True)
    await worker.load_adapters()
    await server.start()
    freeze_startup_objects()
    _log_start(settings, worker, server.port)
    pushing = asyncio.create_task(push(worker, settings, server.port))
    pushing.add_done_callback(report_crash)
    keeping = asyncio.create_task(worker.keep_adapters()) if settings.adapters_file is not None else None
    try:
        await _first(stop, worker.died())
        failed = worker.engines.dead
        pushing.cancel()  # first, so that routers stop choosing this worker
        if settings.drain_limit and not failed:
            stop.clear()  # a second signal ends the draining, a third the process
            await _first(stop, worker.died(), worker.drain(settings.drain_limit, stop))
            failed = worker.engines.dead
            stop.set()
        finished = await worker.finish_requests(0.0 if failed else settings.grace_period)
    finally:
        pushing.cancel()
        if keeping is not None:
            keeping.cancel()
        await asyncio.gather(*(task for task in (pushing, keeping) if task is not None), return_exceptions=True)
        worker.close()
        await server.stop(SHUTDOWN_MARGIN)
    logger.info(
        "worker_stopped",
        reason="engine dead" if failed else "asked to",
        finished=finished,
        uptime=round(time.monotonic() - started, 3),
    )
    return EXIT_FAILED if failed else 0


async def _first(*ends: asyncio.Event | Coroutine[None, None, None]) -> None:
    """Wait until one of the events is set or one of the coroutines is done, and cancel the others."""
    tasks = [asyncio.ensure_future(end.wait() if isinstance(end, asyncio.Event) else end) for end in ends]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _log_start(settings: Settings, worker: Worker, port: int) -> None:
    config = worker.ranks[0].engine.config
    if settings.max_model_len is None and config.max_model_len < settings.gpu.max_model_len:
        logger.warning(
            "max_model_len_lowered",
            max_model_len=config.max_model_len,
            profile=settings.gpu.max_model_len,
            why=f"the cache holds {config.blocks} blocks of {config.block_size} tokens",
        )
    logger.info(
        "worker_started",
        host=settings.host,
        port=port,
        pid=os.getpid(),
        worker_id=worker.info.worker_id,
        model=worker.info.model,
        profile=settings.profile,
        ranks=len(worker.ranks),
        blocks=config.blocks,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        speed=settings.speed,
        generator=settings.generator,
        epoch=worker.epoch,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings, load what they name, and serve. Exit code 2 for invalid settings, 1 for a failure."""

    def start() -> int:
        settings = Settings.load(sys.argv[1:] if argv is None else argv)
        configure(settings.log_level, settings.log_format)
        tokenizer = load_tokenizer(settings.tokenizer, settings.chat_options())
        engine_config(settings, tokenizer)
        generator = make_generator(
            settings.generator, tokenizer, seed=settings.seed, mean_tokens=settings.mean_output_tokens
        )
        with contextlib.closing(generator):
            return run(lambda stop: serve(settings, tokenizer, generator, stop))

    return exit_code("worker", start, SettingsError, TokenizerError, EngineConfigError, GeneratorError, EndpointError)


if __name__ == "__main__":
    sys.exit(main())
