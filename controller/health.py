"""`GET /healthz` of the controller: 200 while it looks after KVClusters."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def health_app(check: Callable[[], None]) -> ASGIApp:
    """An ASGI app. `check` raises `RuntimeError` once nothing is looked after any more: the answer is 500 then."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/healthz":
            answer = PlainTextResponse("not found: /healthz is all there is\n", 404)
        else:
            try:
                check()
                answer = PlainTextResponse("ok\n")
            except RuntimeError as error:
                answer = PlainTextResponse(f"{error}\n", 500)
        await answer(scope, receive, send)

    return app
