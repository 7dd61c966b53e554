"""/openapi.json, /docs and /redoc: the paths that are served, with their requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from pydantic.json_schema import models_json_schema

from worker.asgi import HttpRequest
from worker.emulator.protocol.anthropic import CountTokensRequest, MessagesRequest
from worker.emulator.protocol.chat import BatchChatCompletionRequest, ChatCompletionRequest
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.protocol.responses import ResponsesRequest
from worker.emulator.protocol.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from worker.emulator.server.service import Service

_HTML = (b"content-type", b"text/html; charset=utf-8")

_BODIES: Mapping[str, tuple[type[Any], ...]] = {
    "/v1/completions": (CompletionRequest,),
    "/v1/chat/completions": (ChatCompletionRequest,),
    "/v1/chat/completions/batch": (BatchChatCompletionRequest,),
    "/v1/responses": (ResponsesRequest,),
    "/v1/messages": (MessagesRequest,),
    "/v1/messages/count_tokens": (CountTokensRequest,),
    "/tokenize": (TokenizeCompletionRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
}

_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8"/>
<title>FastAPI - {title}</title>
{head}
</head>
<body>
{body}
</body>
</html>
"""
_SWAGGER = _PAGE.format(
    title="Swagger UI",
    head='<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui.css">',
    body='<div id="swagger-ui"></div>\n'
    '<script src="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui-bundle.js"></script>\n'
    '<script>SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui"})</script>',
)
_REDOC = _PAGE.format(
    title="ReDoc",
    head="",
    body='<redoc spec-url="/openapi.json"></redoc>\n'
    '<script src="https://cdn.jsdelivr.net/npm/redoc@2/bundles/redoc.standalone.js"></script>',
)


class Documentation:
    """The handlers. `routes`: (path, methods). The document is made at the first request for it."""

    def __init__(self, routes: Iterable[tuple[str, Iterable[str]]]) -> None:
        self._routes = routes
        self._document: bytes | None = None

    async def openapi(self, raw_request: HttpRequest, service: Service) -> None:
        if self._document is None:
            self._document = orjson.dumps(document(self._routes))
        await raw_request.reply(200, self._document, (b"content-type", b"application/json"))

    async def swagger(self, raw_request: HttpRequest, service: Service) -> None:
        await raw_request.reply(200, _SWAGGER.encode(), _HTML)

    async def redoc(self, raw_request: HttpRequest, service: Service) -> None:
        await raw_request.reply(200, _REDOC.encode(), _HTML)


def document(routes: Iterable[tuple[str, Iterable[str]]]) -> dict[str, Any]:
    """The OpenAPI document."""
    models = [(model, "validation") for bodies in _BODIES.values() for model in bodies]
    names, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths = {
        path: {method.lower(): _operation(path, method, names) for method in sorted(methods) if method != "HEAD"}
        for path, methods in routes
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "FastAPI", "version": "0.1.0"},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }


def _operation(path: str, method: str, names: Mapping[Any, Any]) -> dict[str, Any]:
    words = path.replace("/", " ").replace("_", " ").replace(".", " ").split()
    operation: dict[str, Any] = {
        "summary": " ".join(words).title(),
        "operationId": f"{'_'.join(words)}_{method.lower()}",
        "responses": {"200": {"description": "Successful Response", "content": {"application/json": {"schema": {}}}}},
    }
    schemas = [names[model, "validation"] for model in _BODIES.get(path, ()) if method == "POST"]
    if schemas:
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
