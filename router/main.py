"""`python -m router.main`: the router, with the data port and the management port in one process on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Sequence

from router.assembly import MANAGEMENT_LIMITS, Router, discovery, http_limits
from router.discovery.sources import listed_workers
from router.server.management import RouterEvent
from router.server.tracing_setup import make_tracing
from router.settings import Settings
from runtime.draining import DrainPolicy
from runtime.http.server import HttpServer
from runtime.logs import EventLogger, configure
from runtime.process import exit_code, freeze_startup_objects, run
from runtime.settings import SettingsError
from runtime.sockets import inherited, listen

logger = EventLogger("router")


def _socket(fd: int | None, host: str, port: int) -> socket.socket:
    return inherited(fd) if fd is not None else listen(host, port)


def _data_server(router: Router, settings: Settings, data_socket: socket.socket) -> HttpServer:
    return HttpServer(
        None,
        data_socket,
        http_limits(settings),
        cancel_on_disconnect=True,
        on_refusal=router.refused,
        refusal_headers=router.cors.headers,
        screen=router.data_plane.screen,
        handler=router.data_plane,
        tls=router.tls_port(),
    )


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Run one router until `stop` is set, then finish the requests in flight. Returns the process's exit code.

    Raises `SettingsError` or `OSError` if the router cannot start.
    """
    priorities: dict[str, int] = {}
    source = await discovery(settings, priorities)
    policy = DrainPolicy(settings.drain_delay, settings.drain_limit)
    proxies = settings.mode != "picker"
    data_socket = _socket(settings.fd, settings.host, settings.port) if proxies else None
    management_socket = _socket(settings.management_fd, settings.management_host, settings.management_port)
    named = settings.model_copy(update={"management_port": management_socket.getsockname()[1]})
    router = Router(named, source, tracing=make_tracing(), priorities=priorities)
    data = _data_server(router, settings, data_socket) if data_socket is not None else None
    picker = router.picker_server() if settings.mode != "proxy" else None
    management = HttpServer(
        router.management_app(), management_socket, MANAGEMENT_LIMITS, screen=router.screen_management
    )
    router.start()
    await management.start()
    if data is not None:
        await data.start()
    if picker is not None:
        await picker.start(unix=router.envoy is None)
    freeze_startup_objects()
    logger.info(
        "router_started",
        host=settings.host,
        port=data.port if data is not None else None,
        management_port=management.port,
        mode=settings.mode,
        tls=settings.tls_cert_path is not None,
        picker_port=picker.port if picker is not None else None,
        picker_health_port=picker.health_port if picker is not None else None,
        pid=os.getpid(),
        strategy=settings.strategy,
        block_size=settings.block_size,
        tokenizer=settings.tokenizer,
        profile=settings.profile,
        speed=settings.speed,
        discovery=source.status().source,
        workers=len(listed_workers(settings.workers)),
    )

    def in_flight() -> int:
        return (data.in_flight if data is not None else 0) + (picker.in_flight if picker is not None else 0)

    try:
        await stop.wait()
        logger.info(
            "router_draining",
            in_flight=in_flight(),
            drain_delay=settings.drain_delay,
            drain_limit=settings.drain_limit,
            grace_period=settings.grace_period,
        )
        router.management.advance(RouterEvent.SIGTERM)
        if picker is not None:
            await picker.ready(ready=False)
        if router.envoy is not None:
            await router.envoy.leave()
        if policy.delay or policy.limit:
            if data is not None:
                data.drain()
            stop.clear()  # a second signal ends the draining, and only a third one the process
            await router.drain(policy, stop)
            stop.set()
            logger.info("router_closing", in_flight=in_flight())
        router.management.advance(RouterEvent.DRAINED)
        router.hand_back_before(settings.grace_period)
        end = router.clock() + settings.grace_period
        if router.envoy is not None:
            await router.envoy.idle(settings.grace_period)
        if picker is not None:
            await picker.stop(max(end - router.clock(), 0.0))
        if data is not None:
            await data.stop(settings.grace_period)
        router.live.broadcast.close()
        router.request_events.close()
    finally:
        await management.stop(1.0)
        await router.close()
    logger.info("router_stopped")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings and serve. Returns exit code 2 for settings that cannot be served."""

    def start() -> int:
        settings = Settings.load(sys.argv[1:] if argv is None else argv)
        configure(settings.log_level, settings.log_format)
        # Threads that read long prompts hold the interpreter's lock between two calls into the tokenizer. The event
        # loop gets it back after a millisecond, not after the default of five.
        sys.setswitchinterval(0.001)
        return run(lambda stop: serve(settings, stop))

    return exit_code("router", start, SettingsError)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
