"""The worker's ASGI app: which handler answers which path, and what every answer has in common."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping

from starlette.types import Receive, Scope, Send

from kvcache.errors import ApiError, engine_dead
from worker.runner import EngineDeadError
from worker.server import info
from worker.server.chat import chat_completions
from worker.server.completions import completions
from worker.server.exposition import Exposition
from worker.server.feed import FeedEndpoints
from worker.server.http import Exchange, Header
from worker.server.service import Service

Handler = Callable[[Exchange, Service], Awaitable[None]]


class App:
    """One worker's HTTP API. A path not listed is 404, a method not listed 405, both in FastAPI's words, as vLLM's."""

    def __init__(self, service: Service, feed: FeedEndpoints, exposition: Exposition) -> None:
        self._service = service
        routes: dict[str, dict[str, Handler]] = {
            "/v1/completions": {"POST": self._generating(completions)},
            "/v1/chat/completions": {"POST": self._generating(chat_completions)},
            "/v1/models": {"GET": info.models},
            "/tokenize": {"POST": info.tokenize},
            "/detokenize": {"POST": info.detokenize},
            "/health": {"GET": info.health},
            "/ping": {"GET": info.health, "POST": info.health},
            "/version": {"GET": info.version},
            "/load": {"GET": info.load},
            "/metrics": {"GET": exposition.metrics},
            "/cache/state": {"GET": feed.state},
            "/cache/events": {"GET": feed.events},
        }
        if service.dev_mode:
            routes["/reset_prefix_cache"] = {"POST": info.reset_prefix_cache}
        self._routes: Mapping[str, Mapping[str, Handler]] = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        if self._service.request_id_headers:
            given = exchange.header(b"x-request-id")
            exchange.common = (*exchange.common, (b"x-request-id", (given or secrets.token_hex(16)).encode("latin-1")))
        methods = self._routes.get(exchange.path)
        if methods is None:
            await exchange.json(404, {"detail": "Not Found"})
            return
        handler = methods.get(exchange.method)
        if handler is None:
            await exchange.json(405, {"detail": "Method Not Allowed"}, _allow(methods))
            return
        try:
            await handler(exchange, self._service)
        except ApiError as error:
            await exchange.error(error)

    @staticmethod
    def _generating(handler: Handler) -> Handler:
        """A handler that occupies the engine: refused while the worker drains, counted in /load."""

        async def counted(exchange: Exchange, service: Service) -> None:
            if service.draining:
                raise ApiError(503, "The server is shutting down and takes no new requests.")
            with service.counted():
                try:
                    await handler(exchange, service)
                except EngineDeadError:
                    raise engine_dead() from None

        return counted


def _allow(methods: Mapping[str, Handler]) -> Header:
    return b"allow", ", ".join(sorted(methods)).encode()
