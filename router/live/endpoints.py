"""The endpoints of the management port that show the live document: the page, the document, its events, and the report
that other routers ask for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Protocol

import orjson
from fastapi import FastAPI, Query, Request, Response

from kvcache.errors import error_body
from kvcache.feed import JSON
from router.live.broadcast import INTERVAL, Broadcast
from router.live.document import DecisionLive, Live, encode
from router.live.gather import Describe, Gatherer
from router.live.peers import Answers
from router.live.report import Report, by, encode_report, latest, live, merged
from router.live.static import INDEX, PageFile, answer, load_page
from runtime.http.event_stream import EventStream, StreamLimit

_NO_STORE = {"cache-control": "no-store"}
PAGE, PAGE_FOLDERS = frozenset({"/"}), ("/page/",)
"""The paths of the page itself, which holds no data: a browser asks for them before the page can show a token."""
VIEWERS = 32
"""Streams of events that are open at one time, at most."""


class Peers(Protocol):
    """The other routers of the same KVCluster."""

    async def answers(self) -> Answers:
        """What each of them knows; of one that does not say, why not. Takes seconds at most."""


@dataclass(slots=True)
class LiveEndpoints:
    """`router` describes this router's own state, given its workers."""

    gatherer: Gatherer
    router: Describe
    peers: Peers
    broadcast: Broadcast = field(init=False)
    viewers: StreamLimit = field(init=False)
    _page: dict[str, PageFile] | None = field(default=None, init=False)
    """Read when somebody first asks for it."""
    _decisions: tuple[DecisionLive, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.broadcast = Broadcast(self._next, INTERVAL)
        busy = f"{VIEWERS} pages are open at this router: close one, or ask GET /live now and then"
        self.viewers = StreamLimit(VIEWERS, busy)

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoints."""
        app.add_api_route("/", self.index, methods=["GET"], include_in_schema=False)
        app.add_api_route("/page/{name}", self.file, methods=["GET"], include_in_schema=False)
        app.add_api_route("/live", self.document, methods=["GET"])
        app.add_api_route("/live/events", self.events, methods=["GET"])
        app.add_api_route("/live/report", self.report, methods=["GET"])

    async def index(self, request: Request) -> Response:
        """The page."""
        return await self.file(INDEX, request)

    async def file(self, name: str, request: Request) -> Response:
        """A file of the page."""
        if self._page is None:
            self._page = load_page()
        found = self._page.get(name)
        if found is None:
            return _error(404, f"the page has no file {name!r:.200}", "NotFoundError")
        return answer(found, request)

    async def document(self, peers: Annotated[bool, Query()] = True) -> Response:
        """The live document (`router.live.document`) of all routers; `?peers=0`: of this router alone."""
        report = await self._all() if peers else self._own()
        return Response(encode(live(report, self.gatherer.wall())), headers=_NO_STORE, media_type=JSON)

    async def report(self, after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """This router's own report (`router.live.report`), for other routers; of its history, steps `after` that."""
        report = self.gatherer.report(self.router, after)
        return Response(encode_report(report), headers=_NO_STORE, media_type=JSON)

    async def events(self) -> Response:
        """Server-sent events (`router.live.updates`): the live document of all routers, then what changes in it."""
        return EventStream(self.broadcast.events(), self.viewers)

    def _own(self) -> Report:
        return self.gatherer.report(self.router)

    async def _all(self) -> Report:
        answers = await self.peers.answers()
        now = self.gatherer.wall()
        report = merged(self._own(), *(by(now, each) for each in answers.reports))
        return replace(report, routers=(*report.routers, *answers.unreachable))

    async def _next(self) -> Live:
        """The next document of the stream. It remembers the decisions of those before, which are more than a router
        keeps while nobody looks."""
        report = await self._all()
        self._decisions = latest((*report.decisions, *self._decisions))
        return live(replace(report, decisions=self._decisions), self.gatherer.wall())


def _error(status: int, message: str, kind: str) -> Response:
    return Response(orjson.dumps(error_body(message, kind, None, status)), status, media_type=JSON)
