"""Endpoints that generate nothing: health, models, tokenize and detokenize, and what those who operate an engine ask.

What has no counterpart in an emulated engine (weights, expert parallelism, sleep) is answered as an idle vLLM answers
it where that needs no such thing, and is not served otherwise.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from kvcache.errors import ApiError
from runtime.draining import DRAINING_HEADER
from worker.asgi import HttpRequest
from worker.emulator.protocol.tokenize import (
    TOKENIZE_REQUEST,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from worker.emulator.protocol.validation import parse_request
from worker.emulator.server.rendering import Bounds, check_multimodal, check_template, conversation, encode
from worker.emulator.server.service import VLLM_VERSION, Service, WorkerState, json_body

UNBOUNDED = 2**63
"""/tokenize takes prompts longer than any context."""


async def health(raw_request: HttpRequest, service: Service) -> None:
    """200 while requests are taken, 503 once the worker drains or its engine is dead. No body.

    A worker that leaves and still takes requests says so in a header: an endpoint that terminates is used for as long
    as it says that it is ready, where there is no other.
    """
    ready = service.state is not WorkerState.CLOSING and not service.engine.dead.is_set()
    draining = [(DRAINING_HEADER.encode(), b"1")] if service.state is WorkerState.DRAINING else []
    await raw_request.reply(200 if ready else 503, b"", *draining)


async def version(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"version": VLLM_VERSION})


async def load(raw_request: HttpRequest, service: Service) -> None:
    """Completion and chat requests under way."""
    await raw_request.json(200, {"server_load": service.in_progress})


async def models(raw_request: HttpRequest, service: Service) -> None:
    permission = {
        "id": f"modelperm-{secrets.token_hex(8)}",
        "object": "model_permission",
        "created": service.started,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    listed = [
        {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "vllm",
            "root": service.root,
            "parent": None,
            "max_model_len": service.max_model_len,
            "permission": [permission],
        }
        for name in service.names
    ]
    await raw_request.json(200, {"object": "list", "data": listed})


async def tokenize(raw_request: HttpRequest, service: Service) -> None:
    """Token ids of a text or of a chat's messages."""
    raw = await json_body(raw_request)
    request = parse_request(TOKENIZE_REQUEST, raw)
    service.check_model(request.model)
    if isinstance(request, TokenizeChatRequest):
        if not service.trust_request_chat_template:
            check_template(request)
        check_multimodal(request)
    tokens = await service.offload(len(raw), lambda: _tokens(request, service))
    strings = [service.tokenizer.token_str(token) for token in tokens] if request.return_token_strs else None
    await raw_request.json(
        200,
        {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens, "token_strs": strings},
    )


def _tokens(request: TokenizeCompletionRequest | TokenizeChatRequest, service: Service) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(request, TokenizeChatRequest):
        return conversation(request.prompt_fields(), Bounds(UNBOUNDED), tokenizer, service.model)
    return encode(request.prompt, tokenizer, add_special_tokens=request.add_special_tokens)


async def detokenize(raw_request: HttpRequest, service: Service) -> None:
    """Text of token ids; those that no token has are left out."""
    request = parse_request(DetokenizeRequest, await json_body(raw_request))
    service.check_model(request.model)
    vocabulary = range(service.tokenizer.vocab_size)
    known = [token for token in request.tokens if token in vocabulary]
    await raw_request.json(200, {"prompt": service.tokenizer.decode(known, skip_special_tokens=False)})


async def reset_prefix_cache(raw_request: HttpRequest, service: Service) -> None:
    """Forget every cached block; refused (`success` false) while a request runs."""
    await raw_request.json(200, {"success": service.engine.reset_prefix_cache()})


_SCALE_OUT = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."


async def kv_event_sources(raw_request: HttpRequest, service: Service) -> None:
    """None: an emulated engine publishes its events over HTTP, at /cache/events."""
    await raw_request.json(200, {})


async def is_sleeping(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"is_sleeping": False})


async def is_paused(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"is_paused": False})


async def is_scaling(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"is_scaling_elastic_ep": False})


async def weight_info(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"weight_version": "default"})


async def world_size(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"world_size": 1})


async def forget_nothing(raw_request: HttpRequest, service: Service) -> None:
    """Reset a cache that an emulated engine has not."""
    await raw_request.reply(200, b"")


async def scale_out_disabled(raw_request: HttpRequest, service: Service) -> None:
    raise ApiError(403, _SCALE_OUT, type="PermissionDeniedError")


async def server_info(raw_request: HttpRequest, service: Service) -> None:
    """The settings that decide about answers, as `vllm_config`; the environment is nobody's business."""
    facts: dict[str, Any] = {
        "model": service.root,
        "served_model_name": service.model,
        "max_model_len": service.max_model_len,
        "block_size": service.block_size,
        "version": VLLM_VERSION,
    }
    await raw_request.json(200, {"vllm_config": json.dumps(facts), "vllm_env": {}, "system_env": {}})


async def abort_requests(raw_request: HttpRequest, service: Service) -> None:
    """End requests by the ids that clients gave or got; all of them when none is named."""
    try:
        body = json.loads(await raw_request.body())
    except ValueError:
        raise ApiError(400, "Invalid JSON format", type="Bad Request") from None
    if not isinstance(body, dict):
        raise ApiError(400, "Request body must be a JSON object", type="Bad Request")
    named = body.get("request_ids")
    await raw_request.json(200, {"status": "aborted", "aborted": service.abort(named or None)})
