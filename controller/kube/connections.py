"""All connections to the API server, ours and kopf's: whether it answers, said once when that changes, and how to break
them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, StrEnum, auto
from typing import cast
from weakref import WeakSet

import aiohttp
import kopf

from controller.kube.watches import WatchAges, WatchedContent
from runtime.kube.client import Address
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.logs import EventLogger
from runtime.sockets import kept_alive

logger = EventLogger(__name__)

HEADERS_TIMEOUT = 10.0
"""Seconds for an answer to begin. A watch's begins at once: what happens comes later."""


class ApiServerState(Enum):
    """How the API server has been lately."""

    ANSWERING = auto()
    DOUBTFUL = auto()
    """One request went without a proper answer: a connection that was cut, perhaps."""
    LOST = auto()
    """So did the next; the log says so."""


class ApiServerEvent(Enum):
    """What shows how the API server is."""

    ANSWERED = auto()
    REFUSED = auto()
    """It answered 401, 403 or 429, as it does to everything for a moment after its start."""
    FAILED = auto()
    """It could not be reached, was silent, or said that it cannot answer."""


API_SERVER_TRANSITIONS: Mapping[tuple[ApiServerState, ApiServerEvent], ApiServerState] = {
    (ApiServerState.ANSWERING, ApiServerEvent.FAILED): ApiServerState.DOUBTFUL,
    (ApiServerState.DOUBTFUL, ApiServerEvent.FAILED): ApiServerState.LOST,
    (ApiServerState.DOUBTFUL, ApiServerEvent.ANSWERED): ApiServerState.ANSWERING,
    (ApiServerState.DOUBTFUL, ApiServerEvent.REFUSED): ApiServerState.ANSWERING,
    (ApiServerState.LOST, ApiServerEvent.ANSWERED): ApiServerState.ANSWERING,
}
"""What is not listed changes nothing."""


class Operation(StrEnum):
    """What a request was for."""

    READ = "read"
    WRITE = "write"
    WATCH = "watch"


_NO_FAILURE = (404, 410)
"""There is none, or no longer: an answer like any other."""


class ApiServerConnections:
    """What all connections to one API server have in common. `clock` in seconds.

    `failed` is called for each request, kopf's or ours, that went without an answer of success.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        failed: Callable[[Operation, ApiFailureCause], None] = lambda operation, cause: None,
    ) -> None:
        self._clock = clock
        self._failed = failed
        self.watches = WatchAges(clock)
        """kopf's watches."""
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._since = 0.0
        self.state = ApiServerState.ANSWERING
        self.restored = asyncio.Event()
        """Set when it answers again after a failure; whoever waits for that clears it."""

    # --- whether it answers -----------------------------------------------------------------------------

    def advance(self, event: ApiServerEvent, why: str = "") -> None:
        """The only way in which `state` changes. `why`: what failed, for the log."""
        before = self.state
        self.state = API_SERVER_TRANSITIONS.get((before, event), before)
        if self.state is before:
            return
        if self.state is ApiServerState.DOUBTFUL:
            self._since = self._clock()
        elif self.state is ApiServerState.LOST:
            logger.warning("api_server_lost", why=why)
        else:
            self.restored.set()
            if before is ApiServerState.LOST:
                logger.info("api_server_restored", after_seconds=self._clock() - self._since)

    async def observe(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """A client middleware of aiohttp. Raises what the request raises."""
        operation = _operation(request)
        try:
            async with asyncio.timeout(HEADERS_TIMEOUT):
                response = await send(request)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._failed(operation, ApiFailureCause.CONNECT)
            self.advance(ApiServerEvent.FAILED, repr(error))
            raise
        if response.status >= 400 and response.status not in _NO_FAILURE:
            self._failed(operation, KubeApiError(response.status, "", "").cause)
        if response.status == 500:
            return response  # what it asks in its turn failed, such as a webhook: of itself that says nothing
        if response.status > 500:
            self.advance(ApiServerEvent.FAILED, f"it answers {response.status}")
        elif response.status in (401, 403, 429):
            self.advance(ApiServerEvent.REFUSED)
        else:
            self.advance(ApiServerEvent.ANSWERED)
        return response

    async def observe_watches(
        self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """The same for a session whose watches are to have an age."""
        response = await self.observe(request, send)
        path = request.url.path
        if response.status == 404:
            self.watches.gone(path)
        elif response.status == 200 and _operation(request) is Operation.WATCH:
            self.watches.alive(path)
            alive = functools.partial(self.watches.alive, path)
            response.content = cast(aiohttp.StreamReader, WatchedContent(response.content, alive))
        return response

    # --- its connections --------------------------------------------------------------------------------

    def socket(self, address: Address) -> socket.socket:
        """A socket for a connection to the API server: `socket_factory` of aiohttp's connectors."""
        made = kept_alive(address)
        self._sockets.add(made)
        return made

    def cut(self) -> None:
        """Break every connection there is, idle ones too: whoever uses one notices at once, and connects anew."""
        for each in list(self._sockets):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed, or not connected yet

    def session(self, login: kopf.ConnectionInfo) -> kopf.AiohttpSession:
        """What kopf talks to the API server through, as this login."""
        connector = aiohttp.TCPConnector(limit=0, ssl=login.as_ssl_context(), socket_factory=self.socket)
        session = aiohttp.ClientSession(
            connector=connector,
            headers=login.as_http_headers(),
            proxy=login.proxy_url,
            trust_env=login.trust_env,
            middlewares=(self.observe_watches,),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return kopf.AiohttpSession(
            server=login.server,
            default_namespace=login.default_namespace,
            expiration=login.expiration,
            aiohttp_session=session,
        )


def _operation(request: aiohttp.ClientRequest) -> Operation:
    if request.method != "GET":
        return Operation.WRITE
    return Operation.WATCH if request.url.query.get("watch") == "true" else Operation.READ


@contextlib.contextmanager
def without_retry_lines(connections: ApiServerConnections) -> Iterator[None]:
    """Within, kopf's line for each request that fails is dropped while it is known that requests fail."""
    handlers = list(logging.getLogger().handlers)

    def keep(record: logging.LogRecord) -> bool:
        known = connections.state is not ApiServerState.ANSWERING and record.name.startswith("kopf.")
        return not (known and record.getMessage().startswith("Request attempt #"))

    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)
