"""A management port that serves the page with documents and answers that a test has made."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from router.live.broadcast import Broadcast
from router.live.document import Live
from router.live.static import answer, load_page
from runtime.http.event_stream import EventStream, StreamLimit
from runtime.http.server import HttpLimits, HttpServer
from runtime.sockets import listen
from tests.processes import free_port

UNCHANGED = 1.0
"""Seconds after which a document that has not changed is sent again, as routers do."""


class MadeRouter:
    """What a router with a given live document answers. `live` may be replaced at any time."""

    def __init__(self, interval: float = 0.02) -> None:
        self._live: Live | None = None
        self._replaced = asyncio.Event()
        self.explanation: dict[str, Any] = {}
        self.explain_status = 200
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Questions to `POST /route/explain`: path and body."""
        self.port = free_port()
        self._interval = interval
        self._page = load_page()
        self._server: HttpServer | None = None
        self._broadcast: Broadcast | None = None
        self._limit = StreamLimit(32, "close a page")

    @property
    def live(self) -> Live | None:
        """None: it has no live document, like a router of an earlier version."""
        return self._live

    @live.setter
    def live(self, live: Live | None) -> None:
        self._live = live
        self._replaced.set()

    @property
    def viewers(self) -> int:
        """Streams that are open."""
        return 0 if self._broadcast is None else self._broadcast.viewers

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    async def start(self) -> None:
        """Serve, on the same port as before."""
        self._broadcast = Broadcast(self._document, self._interval)
        app = FastAPI()
        app.add_api_route("/", self._index, methods=["GET"])
        app.add_api_route("/page/{name}", self._file, methods=["GET"])
        app.add_api_route("/live/events", self._events, methods=["GET"])
        app.add_api_route("/route/explain", self._explain, methods=["POST"])
        self._server = HttpServer(app, listen("127.0.0.1", self.port), HttpLimits())
        await self._server.start()

    async def stop(self) -> None:
        """Be gone."""
        if self._server is not None and self._broadcast is not None:
            self._broadcast.close()
            await self._server.stop(0)
        self._server = None

    async def _document(self) -> Live:
        """The next document: as soon as a test replaces it, or after a second, as a router would."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UNCHANGED):
                await self._replaced.wait()
        self._replaced.clear()
        assert self._live is not None
        return self._live

    async def _index(self, request: Request) -> Response:
        return answer(self._page["index.html"], request)

    async def _file(self, name: str, request: Request) -> Response:
        return answer(self._page[name], request)

    async def _events(self) -> Response:
        if self.live is None or self._broadcast is None:
            return Response(orjson.dumps({"error": {"message": "there is no such endpoint"}}), 404)
        self._replaced.set()  # a page that opens gets its first document at once
        return EventStream(self._broadcast.events(), self._limit)

    async def _explain(self, request: Request, path: str) -> Response:
        self.asked.append((path, orjson.loads(await request.body())))
        return Response(orjson.dumps(self.explanation), self.explain_status, media_type="application/json")
