"""`python -m worker.agent.main`: the cache agent beside one vLLM."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from kvcache.errors import ApiError
from runtime.http.server import HttpLimits, HttpServer
from runtime.logs import EventLogger, configure
from runtime.process import EXIT_FAILED, exit_code, freeze_startup_objects, run
from runtime.settings import SettingsError
from runtime.sockets import inherited, listen
from worker.agent.agent import Agent
from worker.agent.metrics import AgentCollector
from worker.agent.prompts import expected_prompts
from worker.agent.settings import Settings
from worker.asgi import Exposition, HttpRequest, process_metrics

logger = EventLogger("worker.agent")

SHUTDOWN_MARGIN = 0.5
"""Seconds for the last bytes of the feed's streams to reach their readers."""

Handler = Callable[[HttpRequest, Agent], Awaitable[None]]


class App:
    """One agent's HTTP API."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        registry = CollectorRegistry()
        process_metrics(registry)
        registry.register(AgentCollector(agent))
        self._routes: Mapping[str, Handler] = {
            "/health": health,
            "/metrics": Exposition(registry).metrics,
            "/cache/state": agent.feed.state,
            "/cache/events": agent.feed.events,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HttpRequest(scope, receive, send)
        handler = self._routes.get(request.path)
        if handler is None:
            await request.json(404, {"detail": "Not Found"})
        elif request.method != "GET":
            await request.json(405, {"detail": "Method Not Allowed"}, (b"allow", b"GET"))
        else:
            try:
                await handler(request, self._agent)
            except ApiError as error:
                await request.error(error)


async def health(request: HttpRequest, agent: Agent) -> None:
    """200 while the engine answers, its events are followed and its prompts are known; else 503 with the reason."""
    if agent.problem:
        raise ApiError(503, agent.problem)
    await request.json(200, {"complete": agent.complete})


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Run one agent until `stop` is set. The process's exit code."""
    sock = inherited(settings.fd) if settings.fd is not None else listen(settings.host, settings.port)
    agent = Agent(
        settings, lambda: expected_prompts(settings.tokenizer, settings.chat_options()), sock.getsockname()[1]
    )
    server = HttpServer(App(agent), sock, HttpLimits(), cancel_on_disconnect=True)
    await server.start()
    freeze_startup_objects()
    logger.info(
        "agent_started",
        host=settings.host,
        port=server.port,
        pid=os.getpid(),
        worker_id=agent.worker_id,
        engine=settings.engine_url,
        events=settings.events_endpoint,
        replay=settings.replay_endpoint or "none",
    )
    running = asyncio.create_task(agent.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        failed = running.done()
    finally:
        agent.stop_serving()
        for task in (running, stopping):
            task.cancel()
        results = await asyncio.gather(running, stopping, return_exceptions=True)
        await server.stop(SHUTDOWN_MARGIN)
        agent.close()
    logger.info("agent_stopped", reason=repr(results[0]) if failed else "asked to")
    return EXIT_FAILED if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings and serve. Exit code 2 for invalid settings, 1 if the port cannot be listened on or the agent
    fails."""

    def start() -> int:
        settings = Settings.load(sys.argv[1:] if argv is None else argv)
        configure(settings.log_level, settings.log_format)
        return run(lambda stop: serve(settings, stop))

    return exit_code("agent", start, SettingsError)


if __name__ == "__main__":
    sys.exit(main())
