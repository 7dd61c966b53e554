"""The ASGI application: filters (faults, authentication, authorisation), then the handler of the path.

A fault of the fake itself is answered with 500, and fails the test when the server is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import traceback
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from tests.kube.apiserver import documents, handlers, subresources
from tests.kube.apiserver.cluster import Cluster
from tests.kube.apiserver.errors import ApiError, no_such_path, not_modelled
from tests.kube.apiserver.faults import Faults
from tests.kube.apiserver.rbac import authorized, forbidden
from tests.kube.apiserver.request import Call, Logged, authenticate, of_watch, read
from tests.kube.apiserver.resources import BUILTIN_GROUPS, Resource
from tests.kube.apiserver.watch import Watch

JSON = "application/json"


class App:
    """Serves a cluster over HTTP."""

    def __init__(self, cluster: Cluster, bookmark_seconds: float) -> None:
        self.cluster = cluster
        self.requests: list[Logged] = []
        self.watches: set[Watch] = set()
        self.faults = Faults(self.cut_watches)
        self.crashes: list[Exception] = []
        self.client: httpx.AsyncClient | None = None
        self._bookmark_seconds = bookmark_seconds

    def cut_watches(self) -> int:
        for watch in list(self.watches):
            watch.cut()
        return len(self.watches)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            call = await read(Request(scope, receive))
        except ClientDisconnect:
            return
        try:
            await self._answer(call, receive, send)
        except ApiError as error:
            await self._fail(call, send, error)
        except Exception as error:  # noqa: BLE001  a server answers whatever happens
            # A fault of the fake itself: the client is told, and so is the test (`FakeApiServer.stop` raises it).
            self.crashes.append(error)
            text = "".join(traceback.format_exception(error))
            await self._fail(call, send, ApiError(500, f"the fake API server failed:\n{text}"))

    async def _fail(self, call: Call, send: Send, error: ApiError) -> None:
        await self._send(call, send, error.code, orjson.dumps(error.body()), headers=error.headers)

    async def _answer(self, call: Call, receive: Receive, send: Send) -> None:
        call.user = authenticate(call.headers)
        wanted = call.attributes()
        await self.faults.strike(wanted, call.user.name)
        if not authorized(self.cluster, call.user, wanted):
            raise forbidden(call.user, wanted)
        if not call.resource:
            await self._plain(call, send)
            return
        resource = self._resource(call)
        if call.verb == "watch":
            await self._watch(resource, call, receive, send)
            return
        if call.subresource == "proxy":
            assert self.client is not None
            async with subresources.proxied(self.cluster, resource, call, self.client) as answer:
                await self._pass_on(answer, call, receive, send)
            return
        handle = subresources.scale if call.subresource == "scale" else handlers.handle
        status, body = handle(self.cluster, resource, call)
        await self._send(call, send, status, body)

    def _resource(self, call: Call) -> Resource:
        """What a call is for. Raises `ApiError`: 501 for what Kubernetes has and this server not, else 404."""
        resource = self.cluster.registry.find(call.group, call.version, call.resource)
        if resource is None and call.group in BUILTIN_GROUPS:
            raise not_modelled(f"{call.resource} of the group {call.group!r}")
        if resource is None:
            raise no_such_path()
        if call.subresource and call.subresource not in resource.subresources:
            raise no_such_path() if resource.custom else not_modelled(call.attributes().full)
        return resource

    async def _send(
        self, call: Call, send: Send, status: int, body: bytes, kind: str = JSON, headers: dict[str, str] | None = None
    ) -> None:
        self.requests.append(call.logged(status))
        shown = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        shown += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        for warning in call.warnings:
            quoted = warning.replace("\\", "\\\\").replace('"', '\\"')
            shown.append((b"warning", f'299 - "{quoted}"'.encode()))
        await send({"type": "http.response.start", "status": status, "headers": shown})
        await send({"type": "http.response.body", "body": body})

    async def _pass_on(self, answer: httpx.Response, call: Call, receive: Receive, send: Send) -> None:
        """A pod's answer, as it comes, until it ends, breaks off, or the client leaves."""
        self.requests.append(call.logged(answer.status_code))
        kind = answer.headers.get("content-type", "application/octet-stream")
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})

        async def pieces() -> None:
            with contextlib.suppress(httpx.HTTPError):
                async for piece in answer.aiter_bytes():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})

        ends = [asyncio.ensure_future(pieces()), asyncio.ensure_future(_left(receive))]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for each in ends:
            each.cancel()

    async def _plain(self, call: Call, send: Send) -> None:
        """Paths that name no resource."""
        registry = self.cluster.registry
        parts = [part for part in call.path.split("/") if part]
        kind = JSON
        answer: Any
        match parts:
            case ["version"]:
                answer = documents.VERSION
            case ["api"]:
                answer = documents.API_VERSIONS
            case ["apis"]:
                answer = documents.groups(registry)
            case ["api", version]:
                answer = documents.resources(registry, "", version)
            case ["apis", group, version]:
                answer = documents.resources(registry, group, version)
            case ["openapi", *rest]:
                kind, answer = documents.openapi(registry, rest, call.accept) or (JSON, None)
            case _:
                answer = None
        if answer is None:
            raise no_such_path()
        body = answer if isinstance(answer, bytes) else orjson.dumps(answer)
        await self._send(call, send, 200, body, kind)

    async def _watch(self, resource: Resource, call: Call, receive: Receive, send: Send) -> None:
        if handlers.TABLE in call.accept:
            raise not_modelled("a watch as a table")
        asked = of_watch(call.query)
        chosen = handlers.selection(resource, call)
        seconds = float(asked.seconds or random.uniform(1800, 3600))
        watch = Watch(
            self.cluster.store, chosen, bookmarks=asked.bookmarks, kind=(resource.api_version, resource.kind),
            bookmark_seconds=self._bookmark_seconds,
        )  # fmt: skip
        self.requests.append(call.logged(200))
        headers = [(b"content-type", JSON.encode()), (b"cache-control", b"no-cache, private")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # Headers go out with the first chunk of the body, and a client waits for them.
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        self.watches.add(watch)
        gone = asyncio.ensure_future(_disconnected(receive, watch))
        try:
            lines = watch.lines(asked.since, seconds, initial_end=asked.initial and asked.bookmarks)
            async with contextlib.aclosing(lines):
                async for chunk in lines:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except OSError:
            return
        finally:
            self.watches.discard(watch)
            gone.cancel()
        if not watch.was_cut:
            await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _disconnected(receive: Receive, watch: Watch) -> None:
    await _left(receive)
    watch.cut()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    sock = socket.create_server((host, port), backlog=2048)
    sock.setblocking(False)
    # Inherited by connections; asyncio sets it itself only where the socket names its protocol.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def serve(app: Any, sock: socket.socket, state: ServerState) -> asyncio.Server:
    """Serve with uvicorn's protocol; its own `Server` takes over signals, and needs up to 0.2 s to stop."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        ws="none",
        interface="asgi3",
        timeout_keep_alive=90,
    )
    config.load()

    def protocol() -> asyncio.Protocol:
        return config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]

    return await asyncio.get_running_loop().create_server(protocol, sock=sock, backlog=2048)
