"""The data port: OpenAI's API for clients, and nothing else. A raw ASGI app; bodies pass through byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from router.server.headers import to_worker
from router.server.metrics import Metrics
from router.server.prompts import CHAT, COMPLETIONS, UNREAD, PromptReader
from router.server.proxy import Proxy, answer_json
from router.server.upstream import UpstreamRequest

_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
"""What may stand in a request's target: all else (a client's UTF-8, say) is percent-encoded."""
CLIENT_LEFT = 499
"""Status in the metrics (nginx's) of a request whose client left before it was answered."""


@dataclass(frozen=True, slots=True)
class DataPlane:
    """`POST /v1/completions` and `/v1/chat/completions` go where their prefix is cached; every other /v1 path,
    /tokenize and /detokenize to the least loaded worker."""

    proxy: Proxy
    prompts: PromptReader
    metrics: Metrics
    clock: Callable[[], float]
    strategy: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        code = CLIENT_LEFT
        try:
            code = await self._answer(scope, receive, send)
        except (OSError, asyncio.CancelledError):
            raise
        except BaseException:
            code = 500
            raise
        finally:
            self.metrics.requests.labels(str(code), self.strategy).inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        arrived = self.clock()
        path: str = scope["path"]
        method: str = scope["method"]
        if not _is_forwarded(path):
            await answer_json(send, 404, b'{"detail":"Not Found"}', [])
            return 404
        body: bytes = (await receive()).get("body", b"")
        headers, request_id = to_worker(scope["headers"])
        target: bytes = scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        route = UNREAD
        if method == "POST" and path in (COMPLETIONS, CHAT):
            route = await self.prompts.read(path, body)
            if route.prompt_tokens is not None:
                self.metrics.prompt_tokens.inc(route.prompt_tokens)
        request = UpstreamRequest(method, quote(target, safe=_PRINTABLE), headers, body)
        return await self.proxy.forward(request, route, request_id, arrived, send)


def _is_forwarded(path: str) -> bool:
    if path.startswith("/v1/"):
        return ".." not in path  # a worker's own server might resolve it to a path that is not for clients
    return path in ("/tokenize", "/detokenize")
