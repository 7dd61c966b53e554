"""`python -m controller.main`: the controller process: it reconciles KVClusters and serves metrics and health."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import aiohttp
import kopf
from prometheus_client import CollectorRegistry, ProcessCollector, make_asgi_app
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.kube.client import KubeClient
from controller.kube.connections import ApiServerConnections, without_retry_lines
from controller.metrics import ClusterCollector, Metrics
from controller.operator import Operator, registry
from controller.reconcile.inventory import Inventory
from controller.reconcile.reconciler import Reconciler
from controller.reconcile.reports import ReportCollector
from controller.reconcile.tokens import FileTokens, SecretTokens
from controller.settings import Settings
from runtime.http.server import HttpServer
from runtime.http.tokens import TokenFile, TokenFileError
from runtime.kube.client import ApiServer
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import NoClusterError
from runtime.logs import EventLogger, configure
from runtime.process import exit_code, run
from runtime.settings import SettingsError
from runtime.sockets import listen

logger = EventLogger("controller")


def management_tokens(settings: Settings) -> TokenFile | None:
    """The tokens of the Secret that the installation names for all KVClusters; None: the controller reads and makes
    one for each. Raises `SettingsError`."""
    if (settings.management_secret is None) != (settings.management_token_file is None):
        raise SettingsError(
            "--management-secret and --management-token-file go together: the first names the Secret that routers "
            "mount, the second says where the controller finds its tokens"
        )
    if settings.management_token_file is None:
        return None
    try:
        return TokenFile(settings.management_token_file)
    except TokenFileError as error:
        file = settings.management_token_file
        raise SettingsError(f"--management-token-file {file} cannot be used: {error}") from None


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Reconciles KVClusters until `stop` is set. The exit code. Raises `NoClusterError`, `SettingsError`, or `OSError`
    for a port."""
    shared = management_tokens(settings)
    credentials = await find_credentials(settings.kubeconfig)
    metrics_registry = CollectorRegistry()
    ProcessCollector(registry=metrics_registry)
    metrics = Metrics(metrics_registry)
    inventory, connections = Inventory(), ApiServerConnections(time.monotonic, metrics.request_failed)
    async with (
        ApiServer(
            credentials, "kvcluster-controller", sockets=connections.socket, middlewares=(connections.observe,)
        ) as api_server,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
    ):
        client = KubeClient(api_server, metrics.wrote)
        tokens = SecretTokens(client, time.monotonic)
        reconciler = Reconciler(
            client,
            inventory,
            settings.release,
            ReportCollector(session, tokens if shared is None else FileTokens(shared)),
            clock=time.monotonic,
            now=lambda: datetime.now(UTC),
            instance=socket.gethostname(),
            secrets=tokens,
            repaired=metrics.repaired,
            recheck=settings.api_recheck,
        )
        operator = Operator(
            client,
            connections,
            inventory,
            reconciler,
            metrics,
            namespaces=settings.watch_namespaces,
            workers=settings.workers,
            rng=random.Random(),
        )
        metrics_registry.register(ClusterCollector(inventory, lambda: len(operator.queue), connections.watches.ages))
        following = asyncio.create_task(shared.follow()) if shared is not None else None
        server = HttpServer(make_asgi_app(metrics_registry), listen(settings.host, settings.metrics_port))
        await server.start()
        health = HttpServer(health_app(operator.check), listen(settings.host, settings.health_port))
        await health.start()
        logger.info(
            "controller_started",
            api_server=credentials.server,
            namespaces=",".join(settings.watch_namespaces) or "all",
            image=settings.image,
            metrics_port=server.port,
            health_port=health.port,
            pid=os.getpid(),
        )
        try:
            with without_retry_lines(connections):
                await kopf.operator(
                    registry=registry(operator, stop, credentials.server if credentials.in_pod else None),
                    settings=kopf.OperatorSettings(),
                    clusterwide=not settings.watch_namespaces,
                    namespaces=settings.watch_namespaces,
                    stop_flag=stop,
                    standalone=True,
                )
        finally:
            if following is not None:
                following.cancel()
            await server.stop(1.0)
            await health.stop(1.0)
    logger.info("controller_stopped")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the settings, connects, serves. The exit code: 0, 1 (a port is taken) or 2 (the settings are wrong)."""

    def start() -> int:
        settings = Settings.load(sys.argv[1:] if argv is None else argv)
        configure(settings.log_level, settings.log_format)
        if settings.log_level != "debug":
            logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # kopf logs every event of every object
        if settings.kubeconfig is not None:
            os.environ["KUBECONFIG"] = str(settings.kubeconfig)  # kopf looks for it there
        # Otherwise kopf names itself after the user, and the uid that the image runs under has no name.
        os.environ.setdefault("POD_ID", socket.gethostname())
        return run(lambda stop: serve(settings, stop))

    return exit_code("controller", start, SettingsError, NoClusterError)


def health_app(check: Callable[[], None]) -> ASGIApp:
    """`GET /healthz` as an ASGI app: 200, or 500 when `check` raises `RuntimeError` because nothing is reconciled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/healthz":
            answer = PlainTextResponse("not found: /healthz is all there is\n", 404)
        else:
            try:
                check()
                answer = PlainTextResponse("ok\n")
            except RuntimeError as error:
                answer = PlainTextResponse(f"{error}\n", 500)
        await answer(scope, receive, send)

    return app


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
