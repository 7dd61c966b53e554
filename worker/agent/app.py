"""The agent's ASGI app: the cache feed, health, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.types import Receive, Scope, Send

from kvcache.errors import ApiError
from worker.agent.agent import Agent
from worker.asgi import Exposition, HttpRequest

Handler = Callable[[HttpRequest, Agent], Awaitable[None]]


class App:
    """One agent's HTTP API."""

    def __init__(self, agent: Agent, exposition: Exposition) -> None:
        self._agent = agent
        self._routes: Mapping[str, Handler] = {
            "/health": health,
            "/metrics": exposition.metrics,
            "/cache/state": agent.endpoints.state,
            "/cache/events": agent.endpoints.events,
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
    await request.json(200, {"complete": agent.view.follower.complete})
