"""The data port: inference APIs for clients, and nothing else. A raw ASGI app that passes bodies on unchanged."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import quote

import orjson
from starlette.types import Receive, Scope, Send

from kvcache.errors import ApiError, MessagesError
from kvcache.paths import COMPUTED
from router.metrics import Metrics
from router.server.affinity import ANY_CALLERS, Callers, named_response, with_headers
from router.server.auth import Admitted, Gate, RateExceeded, Unauthorized, without_credentials
from router.server.cors import NO_CORS, Cors, is_preflight
from router.server.headers import find, to_worker
from router.server.models import MODELS, Models
from router.server.own_answers import answer_error, answer_json
from router.server.paths import Access, access, repeatable
from router.server.prompts import INVOCATIONS, MESSAGES, PROMPTED, PROMPTLESS, PromptReader, promptless
from router.server.proxy import Proxy
from router.server.record import RequestRecord
from router.server.recorder import Recorder
from router.upstream.interface import UpstreamRequest
from runtime.http.context import Headers
from runtime.http.tls import CLIENT_IDENTITY

_IN_PATH = "/!$&'()*+,;=:@"
"""The characters that a path may hold besides letters, digits and `-._~` (RFC 3986 3.3): others are percent-encoded."""
_IN_QUERY = "".join(map(chr, range(0x21, 0x7F)))
"""The characters that a query may hold. It is passed on as it came, except for what no request line may hold."""
_ADAPTER = b"x-amzn-sagemaker-adapter-identifier"
"""Header of `INVOCATIONS` that names a LoRA adapter."""
CLIENT_LEFT = 499
"""Status (nginx's) under which the metrics count a request whose client left before it was answered."""


@dataclass(slots=True)
class DataPlane:
    """Sends requests with a prompt (`PROMPTED`) to where their prefix is cached, and requests for every other path of
    an inference API, or of `allowed`, to the least loaded worker that serves their model. What models there are it
    answers itself."""

    proxy: Proxy
    prompts: PromptReader
    models: Models
    metrics: Metrics
    recorder: Recorder
    clock: Callable[[], float]
    strategy: str
    allowed: frozenset[str] = frozenset()
    cors: Cors = NO_CORS
    callers: Callers = ANY_CALLERS
    """How requests say who sends them."""
    gate: Gate | None = None
    """Who may send requests; None: everybody."""
    last_request: float = -math.inf
    """When the last request came, as a time of `clock`."""

    def screen(self, scope: Scope) -> bool:
        """Look at a request as soon as its headers are there, before `__call__`. Returns whether its body is wanted:
        whoever has no key cannot make the router read one, and a browser's preflight has none."""
        gate = self.gate
        return gate is None or (not is_preflight(scope["method"], scope["headers"]) and gate.screen(scope))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        code = CLIENT_LEFT
        record = self.recorder.begin(scope)
        if record is not None and record.whole:
            send = record.sender(send)
        try:
            if self.cors.is_preflight(scope["method"], scope["headers"]):
                code = await self.cors.answer_preflight(scope["headers"], send)
            elif self.gate is None or is_preflight(scope["method"], scope["headers"]):
                code = await self._answer(scope, receive, self.cors.sender(scope["headers"], send), record)
            else:
                send = self.cors.sender(scope["headers"], send)
                code = await self._admit(self.gate, scope, receive, send, record)
        except (OSError, asyncio.CancelledError):
            raise
        except BaseException:
            code = 500
            raise
        finally:
            self.metrics.requests.counts[str(code), self.strategy] += 1
            if record is not None:
                self.recorder.end(record, code, left=code == CLIENT_LEFT)

    async def _admit(self, gate: Gate, scope: Scope, receive: Receive, send: Send, record: RequestRecord | None) -> int:
        """Answer a request if it has a key, and settle what it has used of the key's rates."""
        self.last_request = self.clock()
        try:
            admitted = gate.admitted(scope)
        except Unauthorized as error:
            self.metrics.unauthorized.labels(error.why.value).inc()
            await answer_error(send, error.shaped(scope["path"]), error.headers)
            return error.status
        except RateExceeded as error:
            return await self._refuse(error, scope["path"], send, [])
        code = None
        try:
            code = await self._answer(scope, receive, admitted.sender(send, self.clock), record, admitted)
        finally:
            admitted.settle(code, self.clock())
        return code

    async def _refuse(self, error: RateExceeded, path: str, send: Send, headers: Headers) -> int:
        self.metrics.rate_limited.labels(error.limit.value).inc()
        await answer_error(send, error.shaped(path), [*error.headers, *headers])
        return error.status

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: RequestRecord | None,
        admitted: Admitted | None = None,
    ) -> int:
        arrived = self.last_request = self.clock() if record is None else record.arrived
        path: str = scope["path"]
        method: str = scope["method"]
        judged = access(path, self.allowed)
        if judged is not Access.PASSED:
            return await _not_found(send, path, judged)
        if path.endswith("/"):
            return await _redirect(send, _target(path.rstrip("/"), scope))
        if path.startswith(MODELS) and method == "GET" and (code := await self._list(path, send)):
            return code
        headers, request_id, rank = to_worker(scope["headers"])
        if self.gate is not None:
            headers = without_credentials(headers)
        request = UpstreamRequest(
            method, _target(path, scope), headers, (await receive()).get("body", b""), repeatable(method, path)
        )
        route = PROMPTLESS
        if method == "POST" and path in PROMPTED:
            adapter = find(headers, _ADAPTER).decode("latin-1") if path == INVOCATIONS else ""
            clock = self.clock if record is not None and record.measured else None
            route = with_headers(
                await self.prompts.read(path, request.body, adapter or None, clock), headers, self.callers
            )
            if route.prompt_tokens is not None:
                self.metrics.prompt_tokens.value += route.prompt_tokens
            elif route.unread is not None:
                self.metrics.prompts_unread.labels(route.unread.value).inc()
        elif path not in COMPUTED and (stored := named_response(path)) is not None:
            route = replace(PROMPTLESS, stored=stored)
        elif method == "POST":
            route = promptless(request.body)
        if rank is not None:
            route = replace(route, rank=rank)
        if admitted is not None:
            route = admitted.route(route)
        elif "extensions" in scope and (client := scope["extensions"].get(CLIENT_IDENTITY)):
            route = replace(route, caller=replace(route.caller, tenant=client))
        if record is not None:
            record.read(route, request_id)
        if (refusal := self.models.refuse(route)) is not None:
            refusal = MessagesError(refusal) if path.startswith(MESSAGES) else refusal
            await answer_error(send, refusal, [(b"x-request-id", request_id)])
            return refusal.status
        if admitted is not None:
            try:
                admitted.charge(route, len(request.body), self.clock())
            except RateExceeded as error:
                return await self._refuse(error, path, send, [(b"x-request-id", request_id)])
        return await self.proxy.forward(request, route, request_id, arrived, send, record, admitted)

    async def _list(self, path: str, send: Send) -> int:
        """Answer a request about models. 0: a worker has to."""
        try:
            body = self.models.answer(path)
        except ApiError as error:
            await answer_error(send, error, [])
            return error.status
        if body is None:
            return 0
        await answer_json(send, 200, orjson.dumps(body), [])
        return 200


async def _not_found(send: Send, path: str, judged: Access) -> int:
    if judged is Access.CLOSED:
        message = f"{path} is not passed on to workers: it is no part of an inference API (see --allowed-paths)."
        await answer_error(send, ApiError(404, message), [])
    else:
        await answer_json(send, 404, b'{"detail":"Not Found"}', [])
    return 404


def _target(path: str, scope: Scope) -> str:
    """The path that was checked, in its one normal spelling, and the client's query."""
    target = quote(path, safe=_IN_PATH)
    if query := scope["query_string"]:
        target += "?" + quote(query, safe=_IN_QUERY)
    return target


async def _redirect(send: Send, location: str) -> int:
    """Redirect as vLLM's server does, but by a relative location: a worker would name its own address."""
    headers = [(b"content-length", b"0"), (b"location", location.encode())]
    await send({"type": "http.response.start", "status": 307, "headers": headers})
    await send({"type": "http.response.body"})
    return 307
