"""Requests to one API server and watches at it, over the official client's credentials and TLS.

Its generated calls and models are left aside (docs/decisions/009): paths and parsed JSON are all that is used here.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Self

import aiohttp
import orjson
from kubernetes.aio.client import ApiClient
from kubernetes.aio.config import ConfigException

from runtime.kube.credentials import Credentials
from runtime.kube.errors import ApiFailureCause, KubeApiError, status_error
from runtime.kube.listwatch import Watch
from runtime.sockets import kept_alive

JSON = "application/json"
CONNECT_TIMEOUT = 5.0

_BROKEN = (aiohttp.ClientError, OSError)

Address = tuple[int, int, int, str, Any]
"""An entry of `getaddrinfo`."""


class WatchStream:
    """An open watch."""

    def __init__(self, answer: aiohttp.ClientResponse, lasts: float) -> None:
        self._answer = answer
        self._until = asyncio.get_running_loop().time() + lasts

    async def next(self) -> object | None:
        """The next event; None at the end. Raises `KubeApiError`."""
        try:
            async with asyncio.timeout_at(self._until):
                line = await self._answer.content.readline()
        except TimeoutError:
            message = "the watch brought neither an event nor its end in time"
            raise KubeApiError.of(ApiFailureCause.SILENT, message) from None
        except _BROKEN as error:
            raise KubeApiError.of(ApiFailureCause.CUT, f"the watch broke off: {error!r:.200}") from None
        except ValueError as error:
            raise KubeApiError.of(ApiFailureCause.MALFORMED, f"an event is too long: {error!r:.200}") from None
        return parse_json(line) if line else None

    def close(self) -> None:
        """Cut the connection."""
        self._answer.close()


class ByteStream:
    """The body of an answer that lasts, in pieces."""

    def __init__(self, answer: aiohttp.ClientResponse, silence: float) -> None:
        self._answer = answer
        self._silence = silence

    async def pieces(self) -> AsyncGenerator[bytes]:
        """What comes, as it comes. Raises `KubeApiError`, also after `silence` seconds without a byte."""
        try:
            while True:
                async with asyncio.timeout(self._silence):
                    piece = await self._answer.content.readany()
                if not piece:
                    return
                yield piece
        except TimeoutError:
            message = f"nothing came for {self._silence:g} s"
            raise KubeApiError.of(ApiFailureCause.SILENT, message) from None
        except _BROKEN as error:
            raise KubeApiError.of(ApiFailureCause.CUT, f"the answer broke off: {error!r:.200}") from None

    def close(self) -> None:
        """Cut the connection."""
        self._answer.close()


class ApiServer:
    """A pool of connections to one API server. Made inside the event loop; whoever makes it closes it.

    `timeout`: seconds for a whole answer, and for a watch to begin. `sockets` makes the sockets of its connections,
    `middlewares` are aiohttp's.
    """

    def __init__(
        self,
        credentials: Credentials,
        user_agent: str,
        *,
        timeout: float = 10.0,
        sockets: Callable[[Address], socket.socket] = kept_alive,
        middlewares: Sequence[aiohttp.ClientMiddlewareType] = (),
    ) -> None:
        self.url = credentials.server
        self._timeout = timeout
        configuration = credentials.configuration
        configuration.retries = None  # whether and when to try again is the callers' to decide
        self._client = ApiClient(configuration)
        self._client.user_agent = user_agent
        self._connector = aiohttp.TCPConnector(
            limit=configuration.connection_pool_maxsize,
            ssl=self._client.rest_client.ssl_context,
            socket_factory=sockets,
        )
        self._proxy = configuration.proxy
        self._websockets: aiohttp.ClientSession | None = None
        configuration.client_session_kwargs = {"connector": self._connector, "middlewares": tuple(middlewares)}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cut every connection."""
        if self._websockets is not None:
            await self._websockets.close()
        await self._client.close()  # type: ignore[no-untyped-call]
        await self._connector.close()

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The body of an answer of success. `headers` go on to the pod when the path is that of its proxy. Raises
        `KubeApiError`."""
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._send(method, path, query, body, content_type, headers)
                data = await answer.read()
        except _BROKEN as error:
            raise self._unreachable(error) from None
        if not 200 <= answer.status < 300:
            raise _refusal(answer, data)
        return data

    async def request_object(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The JSON object that an answer of success holds. Raises `KubeApiError`."""
        found = parse_json(await self.request(method, path, query, body, content_type, headers))
        if type(found) is not dict:
            message = f"{self.url}{path} answered something that is no JSON object"
            raise KubeApiError.of(ApiFailureCause.MALFORMED, message)
        return found

    async def watch(self, path: str, watch: Watch, slack: float, query: Mapping[str, str] | None = None) -> WatchStream:
        """Open a watch that fails if it outlasts its time by `slack` seconds. Raises `KubeApiError`."""
        asked = {
            **(query or {}),
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": watch.version,
            "timeoutSeconds": str(watch.seconds),
        }
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._send("GET", path, asked, None, JSON)
                if answer.status == 200:
                    return WatchStream(answer, watch.seconds + slack)
                data = await answer.read()
        except _BROKEN as error:
            raise self._unreachable(error) from None
        raise _refusal(answer, data)

    async def stream(self, path: str, silence: float, headers: Mapping[str, str] | None = None) -> ByteStream:
        """The answer to a GET, open; it fails after `silence` seconds without a byte. Raises `KubeApiError`.

        `headers` go on to the pod when the path is that of its proxy.
        """
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._send("GET", path, None, None, JSON, headers)
                if answer.status == 200:
                    return ByteStream(answer, silence)
                data = await answer.read()
        except _BROKEN as error:
            raise self._unreachable(error) from None
        raise _refusal(answer, data)

    async def websocket(self, path: str, query: Mapping[str, str], protocol: str) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket of this subprotocol. Raises `KubeApiError`."""
        url, headers, _ = await self._request("GET", path, query, None, JSON)
        # The kubelet offers no media type for its streams, and refuses a request that asks for one with 406.
        headers = {name: value for name, value in headers.items() if name.lower() not in ("accept", "content-type")}
        if self._websockets is None:
            self._websockets = aiohttp.ClientSession(connector=self._connector, connector_owner=False)
        try:
            async with asyncio.timeout(self._timeout):
                return await self._websockets.ws_connect(
                    url, headers=headers, protocols=(protocol,), max_msg_size=0, proxy=self._proxy
                )
        except aiohttp.WSServerHandshakeError as error:
            raise status_error(error.status, "", {"message": HTTPStatus(error.status).phrase}) from None
        except _BROKEN as error:
            raise self._unreachable(error) from None

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        content_type: str,
        more_headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        url, headers, sent = await self._request(method, path, query, body, content_type)
        headers.update(more_headers or {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
        answer = await self._client.call_api(method, url, headers, sent, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        return response

    async def _request(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Mapping[str, Any] | None, content_type: str
    ) -> tuple[str, dict[str, str], Any]:
        """URL, headers and body of a request."""
        try:
            # Anew each time: a service account's token is replaced every hour.
            _, url, headers, sent, _ = await self._client.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params={"Accept": JSON, "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
        except (ConfigException, OSError) as error:
            message = f"the service account's token cannot be read: {error}"
            raise KubeApiError.of(ApiFailureCause.UNAUTHORIZED, message) from None
        return url, headers, sent

    def _unreachable(self, error: Exception) -> KubeApiError:
        if isinstance(error, TimeoutError):
            why = f"{self.url} did not answer within {self._timeout:g} s"
        else:
            why = f"{self.url}: {str(error) or repr(error):.300}"
        return KubeApiError.of(ApiFailureCause.CONNECT, f"the API server cannot be reached: {why}")


def parse_json(data: bytes) -> object:
    """Raises `KubeApiError`."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        message = f"the API server sent what is no JSON: {error}"
        raise KubeApiError.of(ApiFailureCause.MALFORMED, message) from None


def _refusal(answer: aiohttp.ClientResponse, data: bytes) -> KubeApiError:
    try:
        status = orjson.loads(data)
    except orjson.JSONDecodeError:
        status = data[:200]
    return status_error(answer.status, answer.headers.get("Retry-After", ""), status)
