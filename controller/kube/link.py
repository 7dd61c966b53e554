"""The way to the API server: whether it answers, said once when that changes, and how to break its connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any
from weakref import WeakSet

import aiohttp
import kopf
from kubernetes.aio.client.rest import RESTClientObject

from runtime.logs import event
from runtime.sockets import kept_alive

logger = logging.getLogger(__name__)

HEADERS_TIMEOUT = 10.0
"""Seconds for an answer to begin. A watch's begins at once: what happens comes later."""


class State(Enum):
    """How the API server has been lately."""

    ANSWERING = auto()
    DOUBTFUL = auto()
    """One request went without a proper answer: a connection that was cut, perhaps."""
    LOST = auto()
    """So did the next; the log says so."""


class Link:
    """What all connections to one API server have in common. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._since = 0.0
        self.state = State.ANSWERING

    # --- whether it answers -----------------------------------------------------------------------------

    def answered(self) -> None:
        """The API server answered a request, if only to refuse it."""
        if self.state is State.LOST:
            event(logger, logging.INFO, "api_server_restored", after_seconds=self._clock() - self._since)
        self.state = State.ANSWERING

    def failed(self, why: str) -> None:
        """It could not be reached, was silent, or said that it cannot answer."""
        if self.state is State.ANSWERING:
            self.state, self._since = State.DOUBTFUL, self._clock()
        elif self.state is State.DOUBTFUL:
            self.state = State.LOST
            event(logger, logging.WARNING, "api_server_lost", why=why)

    async def observe(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """A client middleware of aiohttp. Raises what the request raises."""
        try:
            async with asyncio.timeout(HEADERS_TIMEOUT):
                response = await send(request)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.failed(repr(error))
            raise
        if response.status == 500:
            return response  # what it asks in its turn failed, such as a webhook: of itself that says nothing
        if response.status > 500:
            self.failed(f"it answers {response.status}")
        else:
            self.answered()
        return response

    # --- its connections --------------------------------------------------------------------------------

    def socket(self, address: tuple[int, int, int, str, Any]) -> socket.socket:
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
            middlewares=(self.observe,),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return kopf.AiohttpSession(
            server=login.server,
            default_namespace=login.default_namespace,
            expiration=login.expiration,
            aiohttp_session=session,
        )


class LinkedClient(RESTClientObject):
    """The official client's connection pool, with the link's sockets."""

    def __init__(self, configuration: Any, link: Link) -> None:
        super().__init__(configuration)
        self._link = link

    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, socket_factory=self._link.socket)

    def _create_pool_manager(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=self._create_connector(),
            trust_env=True,
            read_bufsize=2**21,  # an event of a watch is one line, and as long as its object
            middlewares=(self._link.observe,),
        )


class _Unsaid(logging.Filter):
    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def filter(self, record: logging.LogRecord) -> bool:
        said = self._link.state is not State.ANSWERING and record.name.startswith("kopf.")
        return not (said and record.getMessage().startswith("Request attempt #"))


@contextlib.contextmanager
def said_once(link: Link) -> Iterator[None]:
    """Within, kopf's line for each request that fails is dropped while the link says that requests fail."""
    unsaid, handlers = _Unsaid(link), list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(unsaid)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(unsaid)
