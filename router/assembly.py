"""The parts of one router process, made from its settings and wired together."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import random
import socket
import sys
import time
import uuid
from collections import ChainMap
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

import aiohttp
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.types import Scope

from kvcache.keys import KEY_SCHEME
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.core.config import FleetConfig
from router.core.decision import RecentDecisions
from router.core.fleet import Fleet
from router.core.outliers import OutlierPolicy
from router.core.retries import Refusals, RetryBudget, RetryPolicy
from router.credentials import certificate_files, key_file, tls_port, token_file
from router.discovery.merged import MergedDiscovery
from router.discovery.sources import Discovery, FileDiscovery, StaticDiscovery
from router.live.endpoints import PAGE, PAGE_FOLDERS, LiveEndpoints
from router.live.gather import BOUNDS, Gatherer
from router.live.peers import PeerReports, RouterList, StaticRouters
from router.metrics import DiscoveryCollector, FleetCollector, FlowCollector, Metrics
from router.server.access_log import AccessLog, Digests
from router.server.admission import Admission
from router.server.affinity import Callers
from router.server.auth import Gate
from router.server.cors import Cors
from router.server.dataplane import DataPlane
from router.server.management import PROBES, Management
from router.server.models import Models
from router.server.prompts import PromptReader
from router.server.proxy import Proxy
from router.server.rate_exchange import RateExchange
from router.server.recorder import Recorder
from router.server.request_events import RequestEvents
from router.server.resumption import Resumptions
from router.server.tokenizer_loader import TokenizerLoader
from router.settings import Settings
from router.sync.fleet_sync import FleetSync
from router.sync.liveness import Ticker
from router.upstream.in_flight import InFlight, UpstreamTimeouts
from router.upstream.pool import ConnectionPool
from runtime.draining import Drain, DrainPolicy
from runtime.envoy.tls import AUTHORITIES, CERTIFICATE
from runtime.http.hosts import HostCheck
from runtime.http.server import HttpLimits
from runtime.http.tokens import TokenCheck, TokenFile, TokenRule
from runtime.logs import EventLogger, LogFormat
from runtime.process import report_crash
from runtime.tls import CertificateFiles
from runtime.tls_listener import TlsPort

if TYPE_CHECKING:
    from router.discovery.kubernetes import Replacement
    from router.picker.server import PickerServer
    from router.server.key_file import KeyFile
    from router.server.tracing import Tracing
    from runtime.envoy_admin import EnvoyAdmin

logger = EventLogger(__name__)


def fleet_config(settings: Settings) -> FleetConfig:
    """The configuration that the routing decisions start from."""
    return FleetConfig(
        block_size=settings.block_size,
        fingerprint="",
        key_scheme=KEY_SCHEME,
        model=settings.model or "",
        fingerprints=dict.fromkeys(dict(settings.model_tokenizers), ""),
        strategy=settings.strategy,
        latency=settings.gpu.latency.scaled(settings.speed),
        liveness_timeout=settings.liveness_timeout,
        view_timeout=settings.view_timeout,
        outliers=OutlierPolicy(
            consecutive=settings.eject_after,
            rate_gap=settings.eject_rate_gap,
            first_seconds=settings.eject_seconds,
            longest_seconds=settings.eject_longest,
            share=settings.eject_share,
        ),
        history_blocks=settings.history_blocks or settings.gpu.blocks(settings.block_size),
        longest_pause=settings.longest_pause,
        session_ttl=settings.session_ttl,
        session_limit=settings.session_limit,
    )


async def discovery(settings: Settings, priorities: dict[str, int]) -> Discovery:
    """The discovery that the settings name. Workers that push register themselves in addition to it. It keeps in
    `priorities` those of the objectives that it finds, by name.

    Raises `SettingsError` if it is Kubernetes and its API server cannot be found.
    """
    place = settings.kubernetes_namespace, settings.kubernetes_kubeconfig
    if settings.objectives_pool is not None:
        from router.discovery.objectives import ObjectiveWatch, WithObjectives
        from router.discovery.pool_api import find_pool

        api = await find_pool(settings.objectives_pool, *place, setting="--objectives-pool")
        workers = await discovery(settings.model_copy(update={"objectives_pool": None}), priorities)
        return WithObjectives(workers, ObjectiveWatch(api, priorities))
    if settings.kubernetes_service:
        from router.discovery.kubernetes import KubernetesDiscovery, find_service  # 14 MB and 0.15 s

        sources = [KubernetesDiscovery(await find_service(service, *place)) for service in settings.kubernetes_service]
        return sources[0] if len(sources) == 1 else MergedDiscovery(sources)
    if settings.inference_pool is not None:
        from router.discovery.inference_pool import InferencePoolDiscovery
        from router.discovery.pool_api import find_pool

        return InferencePoolDiscovery(await find_pool(settings.inference_pool, *place), priorities)
    if settings.workers_file is not None:
        return FileDiscovery(settings.workers_file)
    return StaticDiscovery(settings.workers)


def pod_name() -> str:
    """Name of this process's pod, which is its host's name in a cluster."""
    return os.environ.get("HOSTNAME") or socket.gethostname()


def other_routers(settings: Settings) -> RouterList:
    """How to learn which other routers there are."""
    if settings.kubernetes_management_service is None:
        return StaticRouters(settings.peers)
    from router.live.kubernetes import ServiceRouters, find_service

    place = settings.kubernetes_management_service, settings.kubernetes_namespace, settings.kubernetes_kubeconfig
    return ServiceRouters(functools.partial(find_service, *place), pod_name())


async def replacement_of(settings: Settings) -> Replacement | None:
    """How to learn whether another router serves; None: there is no way."""
    if settings.kubernetes_own_service is None:
        return None
    from router.discovery.kubernetes import Replacement, find_service

    slices = await find_service(
        settings.kubernetes_own_service, settings.kubernetes_namespace, settings.kubernetes_kubeconfig
    )
    return Replacement(slices, pod_name())


def http_limits(settings: Settings) -> HttpLimits:
    """The limits of the data port."""
    return HttpLimits(
        max_header_bytes=settings.max_header_bytes,
        max_headers=settings.max_headers,
        max_body_bytes=settings.max_body_bytes,
        max_total_body_bytes=settings.total_body_bytes,
        header_timeout=settings.header_timeout,
        body_timeout=settings.body_timeout,
        write_timeout=settings.write_timeout,
        keep_alive=settings.keep_alive,
        max_concurrent_requests=settings.max_concurrent_requests,
    )


def access_log(settings: Settings, digests: Digests, metrics: Metrics) -> AccessLog | None:
    """The access log that the settings ask for, on standard output; None: none."""
    if settings.access_log == "off":
        return None
    form: LogFormat = "json" if settings.access_log == "json" else "kv"
    blocks, size = settings.access_log_blocks, settings.block_size
    output = io.FileIO(sys.stdout.fileno(), "w", closefd=False)
    return AccessLog(output, form, digests, metrics, blocks=blocks, block_size=size)


HAND_BACK_SECONDS = 2.0
"""Seconds before the end of the grace period in which requests that wait are answered."""
TRACING_CLOSE = 3.0
"""Seconds that the export of the last spans may take."""
MANAGEMENT_LIMITS = HttpLimits(max_body_bytes=128 * 2**20, max_concurrent_requests=1024)
"""The limits of the management port. Workers push their full cache state there, which is far larger than a prompt."""


class Router:
    """The parts of one router process, wired together. Must be created inside the event loop."""

    def __init__(
        self,
        settings: Settings,
        source: Discovery,
        load: Callable[[str], Tokenizer] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tracing: Tracing | None = None,
        priorities: MutableMapping[str, int] | None = None,
    ) -> None:
        self.clock = clock
        self._settings = settings
        self._source = source
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.metrics = Metrics(self.registry)
        self.fleet = Fleet(fleet_config(settings))
        self.registry.register(FleetCollector(self.fleet, clock))
        self.registry.register(DiscoveryCollector(source.status))
        recent = RecentDecisions()
        changed = asyncio.Event()
        self.in_flight = InFlight(
            UpstreamTimeouts(
                answer=settings.answer_timeout,
                idle=settings.idle_timeout,
                stall=settings.stall_timeout,
                cut=settings.cut_timeout,
            )
        )
        self.upstream = ConnectionPool(connect_timeout=settings.connect_timeout)
        self._control = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=10), cookie_jar=aiohttp.DummyCookieJar()
        )
        self.fleet_sync = FleetSync(
            self.fleet,
            self.in_flight,
            self.upstream,
            self._control,
            self.metrics,
            clock=clock,
            rng=random.Random(),
            changed=changed,
        )
        self.prompts = PromptReader(None, settings.block_size, lambda: self.fleet.directory.catalogue)
        load = load or (lambda name: load_tokenizer(name, settings.chat_options()))
        self.tokenizer = TokenizerLoader(settings.tokenizer, load, self._adopt, clock)
        self.tokenizers = {
            model: TokenizerLoader(name, load, functools.partial(self._adopt_other, model), clock)
            for model, name in settings.model_tokenizers
        }
        budget = RetryBudget(share=settings.retry_share, floor=settings.retry_floor)
        self.metrics.retry_budget.set_function(lambda: budget.left(clock()))
        objectives = ChainMap(priorities if priorities is not None else {}, dict(settings.objectives))
        callers = Callers(objectives, settings.tenant_header)
        self.admission = Admission(self.fleet, settings.flow_policy, self.metrics, clock) if settings.queues else None
        if self.admission is not None:
            self.registry.register(FlowCollector(self.admission.flow))
        self.proxy = Proxy(
            fleet=self.fleet,
            upstream=self.upstream,
            in_flight=self.in_flight,
            metrics=self.metrics,
            recent=recent,
            clock=clock,
            changed=changed,
            policy=RetryPolicy(settings.retry_attempts, settings.retry_deadline),
            budget=budget,
            refusals=Refusals(),
            on_refused=self.fleet_sync.unreachable,
            on_busy=self.fleet_sync.busy,
            resumptions=Resumptions(self.prompts.known, self.prompts.read).of if settings.resume_streams else None,
            admission=self.admission,
        )
        self.recorder = Recorder(self.metrics, clock, tracing)
        salt = settings.access_log_salt
        digests = Digests(salt.get_secret_value().encode() if salt is not None else os.urandom(32))
        self.request_events = RequestEvents(self.recorder, digests, settings.block_size)
        self.access_log = access_log(settings, digests, self.metrics)
        if self.access_log is not None:
            self.recorder.readers.append(self.access_log.read)
        self.cors = Cors(frozenset(settings.cors_origins))
        self.keys = key_file(settings, clock)
        if (keys := self.keys) is not None:
            self.metrics.api_keys.set_function(lambda: len(keys.keys))
            self.metrics.api_keys_unusable.set_function(lambda: bool(keys.problem))
        self.data_plane = DataPlane(
            self.proxy,
            self.prompts,
            Models(self.fleet.directory),
            self.metrics,
            self.recorder,
            clock,
            settings.strategy,
            frozenset(settings.allowed_paths),
            self.cors,
            callers,
            Gate(keys, clock, time.time) if keys is not None else None,
        )
        self.management = Management(
            fleet=self.fleet,
            prompts=self.prompts,
            metrics=self.metrics,
            registry=self.registry,
            clock=clock,
            changed=changed,
            recent=recent,
            discovery=source.status,
            tokenizer=self.tokenizer,
            tokenizers=self.tokenizers,
            pod=self.fleet_sync.pod,
            request_wait=settings.retry_deadline,
            callers=callers,
            holds=settings.hold_seconds > 0,
            api_keys=self.keys.public if self.keys is not None else None,
        )
        self.certificates = certificate_files(
            "data", "--tls-cert-path", settings.tls_cert_path, self.metrics, settings.tls_client_ca
        )
        self.tokens = token_file(settings)
        self._token_rule: TokenRule | None = None
        if self.tokens is not None:
            metrics = {"/metrics"} if settings.management_open_metrics else set()
            self._token_rule = TokenRule(self.tokens, PROBES | PAGE | metrics, PAGE_FOLDERS)
        self._peers = other_routers(settings)
        gatherer = Gatherer(
            self.fleet,
            self.metrics,
            recent,
            clock=clock,
            wall=time.time,
            pod=self.fleet_sync.pod,
            instance=uuid.uuid4().hex,
            flow=self.admission.flow if self.admission is not None else None,
        )
        self.live = LiveEndpoints(
            gatherer,
            functools.partial(self.management.described, settings.router_name(pod_name()), gatherer.started),
            PeerReports(
                self._peers,
                self._control,
                instance=gatherer.instance,
                bounds=BOUNDS,
                clock=clock,
                token=lambda: self.tokens.first if self.tokens is not None else "",
            ),
        )
        self.rates = RateExchange(
            self.keys,
            self._peers,
            self._control,
            instance=gatherer.instance,
            clock=clock,
            token=lambda: self.tokens.first if self.tokens is not None else "",
        )
        self.metrics.rate_peers.set_function(self.rates.peers)
        self._ticker = Ticker(self.fleet, self.in_flight, self.metrics, clock, self._fell_silent)
        self._tasks: list[asyncio.Task[None]] = []
        self.picker: PickerServer | None = None
        self.envoy: EnvoyAdmin | None = None
        self._picker_certificates: CertificateFiles | None = None

    def tls_port(self) -> TlsPort | None:
        """How the data port speaks TLS; None: it does not."""
        return tls_port(self.certificates, self._settings, self.metrics)

    def picker_server(self) -> PickerServer:
        """A server of the endpoint picker, which shares everything with the data port. Raises `SettingsError` or
        `OSError` if it cannot listen."""
        from router.picker.assembly import make_server  # gRPC takes 30 MB and 0.2 s

        settings = self._settings
        if settings.picker_tls:
            self._picker_certificates = certificate_files("picker", "--cert-path", settings.cert_path, self.metrics)
        self.picker = make_server(
            settings,
            self._picker_certificates,
            self.fleet,
            self.prompts,
            self.data_plane.models,
            self.metrics,
            self.registry,
            self.proxy.recent,
            self.clock,
            self.fleet_sync.busy,
            self.data_plane.callers,
            self.admission,
            self.data_plane.gate,
        )
        return self.picker

    def screen_management(self, scope: Scope) -> bool:
        """Whether the body of a request to the management port is wanted: only of those that are let in."""
        return self._token_rule is None or self._token_rule.admits(scope)

    def management_app(self) -> FastAPI:
        """What the management port serves."""
        app = self.management.app()
        self.live.add_to(app)
        self.request_events.add_to(app)
        self.rates.add_to(app)
        if self._token_rule is not None:
            app.add_middleware(TokenCheck, rule=self._token_rule)
        app.add_middleware(
            HostCheck,
            setting="give the router --management-names (ROUTER_MANAGEMENT_NAMES) with that name",
            names=self._settings.management_names,
        )
        return app

    def start(self) -> None:
        """Start to follow the workers and to load the tokenizer."""
        source = self._source
        self._tasks = [
            asyncio.create_task(self._ticker.run()),
            asyncio.create_task(self.live.gatherer.record()),
            *(asyncio.create_task(each.follow()) for each in self._files() if each is not None),
            asyncio.create_task(self.rates.run()),
            *(asyncio.create_task(loader.run()) for loader in (self.tokenizer, *self.tokenizers.values())),
        ]
        if (file := self._settings.envoy_endpoints) is not None and (admin := self._settings.envoy_admin) is not None:
            from router.picker.envoy_first import EnvoyFirst
            from runtime.envoy_admin import EnvoyAdmin

            self.envoy = EnvoyAdmin(admin, self.clock)
            source = told = EnvoyFirst(source, file, self.envoy.knows, self.fleet.urls, self._secured)
            beside = (told.file.run(), self.envoy.join(), self._be_asked())
            self._tasks += map(asyncio.create_task, beside)
        self._tasks.append(asyncio.create_task(self.fleet_sync.follow(source)))
        for task in self._tasks:
            task.add_done_callback(report_crash)

    async def _secured(self) -> bool:
        """Whether Envoy has taken what the data port is to have: its certificate, the authorities of clients' ones."""
        named = {CERTIFICATE: self._settings.tls_cert_path, AUTHORITIES: self._settings.tls_client_ca}
        wanted = [name for name, path in named.items() if path is not None]
        return self.envoy is None or not wanted or await self.envoy.reads(wanted)

    async def _be_asked(self) -> None:
        """Let Envoy ask once requests would find a worker. Until then it sends them where it knows workers, as it does
        without a router, where this one could only refuse them."""
        if (await self.management.until_ready())["ready"] and self.picker is not None:
            await self.picker.start_unix()

    def _files(self) -> tuple[KeyFile | CertificateFiles | TokenFile | None, ...]:
        """The files that are read again when they change."""
        return self.keys, self.certificates, self._picker_certificates, self.tokens

    async def drain(self, policy: DrainPolicy, cut_short: asyncio.Event) -> None:
        """Wait until requests are sent elsewhere, within the limits of `policy` (`runtime.draining`)."""
        replacement = await replacement_of(self._settings) if policy.limit > policy.delay else None
        drain = Drain(
            policy,
            self.clock,
            last_request=self._last_request,
            replaced=replacement.serves if replacement is not None else None,
        )
        try:
            await drain.wait(cut_short)
        finally:
            if replacement is not None:
                await replacement.close()

    def hand_back_before(self, seconds: float) -> None:
        """The process ends in so many seconds: shortly before, turn away what still waits, so that its clients get an
        answer and can ask another router."""
        if self.admission is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(max(seconds - HAND_BACK_SECONDS, 0.0), self.admission.close)

    def _last_request(self) -> float:
        data = self.data_plane.last_request
        return data if self.picker is None else max(data, self.picker.last_request)

    async def close(self) -> None:
        """End every task and close every connection to a worker."""
        if self.admission is not None:
            self.admission.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fleet_sync.stop()
        await self._peers.close()
        await self.upstream.close()
        await self._control.close()
        if self.envoy is not None:
            await self.envoy.close()
        self.prompts.close()
        if self.access_log is not None:
            await asyncio.to_thread(self.access_log.close)
        if self.recorder.tracing is not None:
            await self.recorder.tracing.close(TRACING_CLOSE)

    def refused(self, status: int) -> None:
        """Count a request that broke a limit of the data port, which answered it with `status`."""
        self.metrics.requests.counts[str(status), self._settings.strategy] += 1

    def _adopt(self, tokenizer: Tokenizer) -> None:
        self.prompts.tokenizer = tokenizer
        self.metrics.tokenizer_loaded.set(1)
        self.fleet.adopt_tokenizer(tokenizer.fingerprint)

    def _adopt_other(self, model: str, tokenizer: Tokenizer) -> None:
        self.prompts.tokenizers[model] = tokenizer
        self.fleet.adopt_tokenizer(tokenizer.fingerprint, model)

    def _fell_silent(self, url: str, why: str) -> None:
        """The worker's requests stay with it for now: it may only be frozen for a moment (`UpstreamTimeouts.stall`)."""
        logger.warning("worker_left", worker=url, why=why)
