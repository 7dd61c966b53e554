"""The emulator's ASGI app: which handler answers which path, and what every answer has in common."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from kvcache.errors import ApiError, engine_dead
from worker.asgi import Exposition, Header, HttpRequest
from worker.emulator.async_engine import EngineDeadError
from worker.emulator.protocol.chat import ChatCompletionRequest
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.protocol.validation import InternalError, parse_json
from worker.emulator.server import management
from worker.emulator.server.chat import batch_chat_completions, chat, chat_completions
from worker.emulator.server.completions import complete, completions
from worker.emulator.server.messages import count_tokens, messages
from worker.emulator.server.openapi import Documentation
from worker.emulator.server.responses import Responses
from worker.emulator.server.service import VLLM_VERSION, EmulatorState, Service, json_body
from worker.feed.ranks import RankedFeed

Handler = Callable[[HttpRequest, Service], Awaitable[None]]
Methods = Mapping[str, Handler]


class App:
    """One worker's HTTP API. Unknown paths get 404 and unknown methods 405, with FastAPI's messages, as in vLLM."""

    def __init__(
        self, service: Service, feed: RankedFeed, exposition: Exposition, kv_event_sources: Mapping[str, Any]
    ) -> None:
        self._service = service
        metrics = exposition.metrics
        responses = Responses(store=service.store_responses)
        routes: dict[str, dict[str, Handler]] = {
            "/v1/completions": {"POST": _generating(completions)},
            "/v1/chat/completions": {"POST": _generating(chat_completions)},
            "/v1/chat/completions/batch": {"POST": _generating(batch_chat_completions)},
            "/v1/responses": {"POST": _generating(responses.create)},
            "/v1/messages": {"POST": _generating(messages)},
            "/v1/messages/count_tokens": {"POST": count_tokens},
            "/invocations": {"POST": _generating(invocations)},
            "/v1/models": {"GET": management.models},
            "/tokenize": {"POST": management.tokenize},
            "/detokenize": {"POST": management.detokenize},
            "/health": {"GET": management.health},
            "/ping": {"GET": management.health, "POST": management.health},
            "/version": {"GET": management.constant({"version": VLLM_VERSION})},
            "/load": {"GET": management.load},
            "/kv_event_sources": {"GET": management.constant(kv_event_sources)},
            "/is_scaling_elastic_ep": {"POST": management.constant({"is_scaling_elastic_ep": False})},
            "/metrics": dict.fromkeys(_EVERY_METHOD, metrics),
            "/cache/state": {"GET": feed.state},
            "/cache/events": {"GET": feed.events},
        }
        for path in _SCALE_OUT:
            routes[path] = {"POST": management.scale_out_disabled}
        if service.runtime_lora:
            routes |= {
                "/v1/load_lora_adapter": {"POST": management.load_lora_adapter},
                "/v1/unload_lora_adapter": {"POST": management.unload_lora_adapter},
            }
        if service.dev_mode:
            routes |= {
                "/reset_prefix_cache": {"POST": management.reset_prefix_cache},
                "/reset_mm_cache": {"POST": management.reset_absent_cache},
                "/reset_encoder_cache": {"POST": management.reset_absent_cache},
                "/server_info": {"GET": management.server_info},
                "/is_sleeping": {"GET": management.constant({"is_sleeping": False})},
                "/is_paused": {"GET": management.constant({"is_paused": False})},
                "/weight_info": {"GET": management.constant({"weight_version": "default"})},
                "/get_world_size": {"GET": management.constant({"world_size": 1})},
                "/abort_requests": {"POST": management.abort_requests},
            }
        pages = Documentation([(path, tuple(methods)) for path, methods in routes.items()])
        for path, page in (("/openapi.json", pages.openapi), ("/docs", pages.swagger), ("/redoc", pages.redoc)):
            routes[path] = {"GET": page, "HEAD": page}
        self._routes: Mapping[str, Methods] = routes
        self._response: Methods = {"GET": _generating(responses.retrieve)}
        self._cancelling: Methods = {"POST": _generating(responses.cancel)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_request = HttpRequest(scope, receive, send)
        if self._service.request_id_headers:
            given = raw_request.header(b"x-request-id")
            raw_request.common = (
                *raw_request.common,
                (b"x-request-id", (given or secrets.token_hex(16)).encode("latin-1")),
            )
        if _is_preflight(raw_request):
            await _refuse_preflight(raw_request)
            return
        methods = self._methods(raw_request.path)
        if methods is None:
            await self._redirect_or_404(raw_request)
            return
        handler = methods.get(raw_request.method)
        if handler is None:
            await raw_request.json(405, {"detail": "Method Not Allowed"}, _allow(methods))
            return
        try:
            await handler(raw_request, self._service)
        except InternalError as error:  # vLLM answers unexpected errors outside of the middleware that adds headers
            raw_request.common = ()
            await raw_request.error(error)
        except ApiError as error:
            await raw_request.error(error)

    def _methods(self, path: str) -> Methods | None:
        """The handlers of a path, by method; None for an unknown path."""
        found = self._routes.get("/metrics" if path.startswith("/metrics") else path)
        if found is not None or not path.startswith("/v1/responses/"):
            return found
        match path.removeprefix("/v1/responses/").split("/"):
            case [name] if name:
                return self._response
            case [name, "cancel"] if name:
                return self._cancelling
            case _:
                return None

    async def _redirect_or_404(self, raw_request: HttpRequest) -> None:
        """Redirect to the path with or without a trailing slash if that is served, else answer 404."""
        path = raw_request.path
        other = path.rstrip("/") if path.endswith("/") else path + "/"
        if path != "/" and self._methods(other) is not None:
            await raw_request.redirect(other)
        else:
            await raw_request.json(404, {"detail": "Not Found"})


_EVERY_METHOD = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""vLLM's /metrics is an app of its own, which ignores the method and the rest of the path."""

_SCALE_OUT = (
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/inference/v1/generate",
    "/inference/v1/abort_requests",
)


def _generating(handler: Handler) -> Handler:
    """Wraps a handler that uses the engine: it is refused while the worker closes, and counted in /load."""

    async def counted(raw_request: HttpRequest, service: Service) -> None:
        if service.state is EmulatorState.CLOSING:
            raise ApiError(503, "The server is shutting down and takes no new requests.")
        with service.counted():
            try:
                await handler(raw_request, service)
            except EngineDeadError:
                raise engine_dead() from None

    return counted


def _allow(methods: Methods) -> Header:
    """The header `allow`. FastAPI names the methods of the path's first route; GET and HEAD share one."""
    return b"allow", ("GET, HEAD" if "HEAD" in methods else next(iter(methods))).encode()


_PREFLIGHT_METHODS = b"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY"
_PREFLIGHT_VARY = (
    b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers, Access-Control-Request-Private-Network"
)


def _is_preflight(raw_request: HttpRequest) -> bool:
    """Whether this is a CORS preflight request."""
    return (
        raw_request.method == "OPTIONS"
        and bool(raw_request.header(b"origin"))
        and bool(raw_request.header(b"access-control-request-method"))
    )


async def _refuse_preflight(raw_request: HttpRequest) -> None:
    """Refuse a CORS preflight request, as vLLM does by default."""
    asked: Header = (
        b"access-control-allow-headers",
        raw_request.header(b"access-control-request-headers").encode("latin-1"),
    )
    raw_request.common = ()
    await raw_request.reply(
        400,
        b"Disallowed CORS origin",
        (b"vary", _PREFLIGHT_VARY),
        (b"access-control-allow-methods", _PREFLIGHT_METHODS),
        (b"access-control-max-age", b"600"),
        *((asked,) if asked[1] else ()),
        (b"content-type", b"text/plain; charset=utf-8"),
    )


ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"


async def invocations(raw_request: HttpRequest, service: Service) -> None:
    """POST /invocations, SageMaker's endpoint: a chat or else a completion request. Raises `ApiError`."""
    raw = await json_body(raw_request)
    body = parse_json(raw) if raw else None
    if isinstance(body, dict):  # the header names a LoRA adapter; the body's model is ignored
        body["model"] = raw_request.header(ADAPTER_HEADER) or None
    if (request := _fitting(ChatCompletionRequest, body)) is not None:
        await chat(raw_request, service, request, len(raw))
    elif (completion := _fitting(CompletionRequest, body)) is not None:
        await complete(raw_request, service, completion, len(raw))
    else:
        names = [ChatCompletionRequest.__name__, CompletionRequest.__name__]
        raise ApiError(400, f"Cannot find suitable handler for request. Expected one of: {names}")


_Model = TypeVar("_Model", bound=BaseModel)


def _fitting(model: type[_Model], body: object) -> _Model | None:
    try:
        return model.model_validate(body)
    except ValidationError:
        return None
    except (TypeError, OverflowError) as error:
        raise ApiError(400, str(error)) from None
    except (AttributeError, KeyError) as error:
        raise InternalError(str(error)) from None
