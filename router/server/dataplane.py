"""The data port: inference APIs for clients, and nothing else. Bodies are passed on unchanged."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import quote

import orjson
from starlette.types import Scope

from kvcache.errors import ApiError, MessagesError
from kvcache.paths import COMPUTED
from router.metrics import Metrics
from router.server.affinity import ANY_CALLERS, Callers, named_response, with_headers
from router.server.auth import Admitted, Gate, RateExceeded, Unauthorized, without_credentials
from router.server.client_answer import ClientAnswer
from router.server.cors import NO_CORS, Cors, is_preflight
from router.server.headers import RequestIds, find, to_worker
from router.server.models import MODELS, Models
from router.server.own_answers import answer_error, answer_json
from router.server.paths import Access, access, repeatable
from router.server.prompts import INVOCATIONS, MESSAGES, PROMPTED, PROMPTLESS, PromptReader, promptless
from router.server.proxy import Proxy
from router.server.record import RequestRecord
from router.server.recorder import Recorder
from router.server.relay import Client
from router.upstream.interface import UpstreamRequest
from runtime.http.context import Headers
from runtime.http.request import ServerRequest
from runtime.tls_listener import CLIENT_IDENTITY

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
    request_ids: RequestIds = field(default_factory=RequestIds)
    last_request: float = -math.inf
    """When the last request came, as a time of `clock`."""

    def screen(self, scope: Scope) -> bool:
        """Look at a request as soon as its headers are there, before `__call__`. Returns whether its body is wanted:
        whoever has no key cannot make the router read one, and a browser's preflight has none."""
        gate = self.gate
        return gate is None or (not is_preflight(scope["method"], scope["headers"]) and gate.screen(scope))

    async def __call__(self, request: ServerRequest) -> None:
        """Answer a request of the data port. Raises `OSError` when the client left."""
        code, scope = CLIENT_LEFT, request.scope
        record = self.recorder.begin(scope)
        answer = ClientAnswer(request, record if record is not None and record.whole else None)
        try:
            if self.cors.origins and (edit := self.cors.edit(scope["headers"])) is not None:
                if self.cors.is_preflight(scope["method"], scope["headers"]):
                    code = self.cors.answer_preflight(scope["headers"], answer)
                    return
                answer.edit(edit)
            if self.gate is None or is_preflight(scope["method"], scope["headers"]):
                code = await self._answer(request, answer, record)
            else:
                code = await self._admit(self.gate, request, answer, record)
        except (OSError, asyncio.CancelledError):
            raise
        except BaseException:
            code = 500
            raise
        finally:
            self.metrics.requests.counts[str(code), self.strategy] += 1
            if record is not None:
                self.recorder.end(record, code, left=code == CLIENT_LEFT)

    async def _admit(
        self, gate: Gate, request: ServerRequest, answer: ClientAnswer, record: RequestRecord | None
    ) -> int:
        """Answer a request if it has a key, and settle what it has used of the key's rates."""
        self.last_request = self.clock()
        scope = request.scope
        try:
            admitted = gate.admitted(scope)
        except Unauthorized as error:
            self.metrics.unauthorized.labels(error.why.value).inc()
            answer_error(answer, error.shaped(scope["path"]), error.headers)
            return error.status
        except RateExceeded as error:
            return self._refuse(error, scope["path"], answer, [])
        code = None
        if (edit := admitted.edit(self.clock)) is not None:
            answer.edit(edit)
        try:
            code = await self._answer(request, answer, record, admitted)
        finally:
            admitted.settle(code, self.clock())
        return code

    def _refuse(self, error: RateExceeded, path: str, answer: ClientAnswer, headers: Headers) -> int:
        self.metrics.rate_limited.labels(error.limit.value).inc()
        answer_error(answer, error.shaped(path), [*error.headers, *headers])
        return error.status

    async def _answer(
        self,
        asked: ServerRequest,
        answer: ClientAnswer,
        record: RequestRecord | None,
        admitted: Admitted | None = None,
    ) -> int:
        scope = asked.scope
        arrived = self.last_request = self.clock() if record is None else record.arrived
        path: str = scope["path"]
        method: str = scope["method"]
        judged = access(path, self.allowed)
        if judged is not Access.PASSED:
            return _not_found(answer, path, judged)
        if path.endswith("/"):
            return _redirect(answer, _target(path.rstrip("/"), scope))
        if path.startswith(MODELS) and method == "GET" and (code := self._list(path, answer)):
            return code
        headers, request_id, rank = to_worker(scope["headers"], self.request_ids.new)
        if self.gate is not None:
            headers = without_credentials(headers)
        request = UpstreamRequest(method, _target(path, scope), headers, asked.take_body(), repeatable(method, path))
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
            answer_error(answer, refusal, [(b"x-request-id", request_id)])
            return refusal.status
        if admitted is not None:
            try:
                admitted.charge(route, len(request.body), self.clock())
            except RateExceeded as error:
                return self._refuse(error, path, answer, [(b"x-request-id", request_id)])
        client = Client(route, request_id, arrived, answer, record, admitted)
        return await self.proxy.forward(request, client, asked.running)

    def _list(self, path: str, answer: ClientAnswer) -> int:
        """Answer a request about models. 0: a worker has to."""
        try:
            body = self.models.answer(path)
        except ApiError as error:
            answer_error(answer, error, [])
            return error.status
        if body is None:
            return 0
        answer_json(answer, 200, orjson.dumps(body), [])
        return 200


def _not_found(answer: ClientAnswer, path: str, judged: Access) -> int:
    if judged is Access.CLOSED:
        message = f"{path} is not passed on to workers: it is no part of an inference API (see --allowed-paths)."
        answer_error(answer, ApiError(404, message), [])
    else:
        answer_json(answer, 404, b'{"detail":"Not Found"}', [])
    return 404


def _target(path: str, scope: Scope) -> str:
    """The path that was checked, in its one normal spelling, and the client's query."""
    target = quote(path, safe=_IN_PATH)
    if query := scope["query_string"]:
        target += "?" + quote(query, safe=_IN_QUERY)
    return target


def _redirect(answer: ClientAnswer, location: str) -> int:
    """Redirect as vLLM's server does, but by a relative location: a worker would name its own address."""
    headers = [(b"content-length", b"0"), (b"location", location.encode())]
    answer.whole(307, headers, b"")
    return 307
