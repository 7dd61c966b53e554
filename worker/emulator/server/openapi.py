"""/openapi.json, /docs and /redoc: the paths that are served, with their requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import orjson
from pydantic.json_schema import models_json_schema

from worker.asgi import HttpRequest
from worker.emulator.protocol.anthropic import CountTokensRequest, MessagesRequest
from worker.emulator.protocol.chat import BatchChatCompletionRequest, ChatCompletionRequest
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.protocol.lora import LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from worker.emulator.protocol.responses import ResponsesRequest
from worker.emulator.protocol.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from worker.emulator.server.service import Service

_BODIES: Mapping[str, tuple[type[Any], ...]] = {
    "/v1/completions": (CompletionRequest,),
    "/v1/chat/completions": (ChatCompletionRequest,),
    "/v1/chat/completions/batch": (BatchChatCompletionRequest,),
    "/v1/responses": (ResponsesRequest,),
    "/v1/messages": (MessagesRequest,),
    "/v1/messages/count_tokens": (CountTokensRequest,),
    "/tokenize": (TokenizeCompletionRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
    "/v1/load_lora_adapter": (LoadLoraAdapterRequest,),
    "/v1/unload_lora_adapter": (UnloadLoraAdapterRequest,),
}


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
        await _page(raw_request, "Swagger UI")

    async def redoc(self, raw_request: HttpRequest, service: Service) -> None:
        await _page(raw_request, "ReDoc")


async def _page(raw_request: HttpRequest, viewer: Literal["Swagger UI", "ReDoc"]) -> None:
    from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html  # 10 MB that hardly a worker needs

    page = get_redoc_html if viewer == "ReDoc" else get_swagger_ui_html
    html = page(openapi_url="/openapi.json", title=f"FastAPI - {viewer}")
    await raw_request.reply(200, bytes(html.body), (b"content-type", b"text/html; charset=utf-8"))


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
