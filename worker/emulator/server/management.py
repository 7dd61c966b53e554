"""Endpoints that generate nothing: health, models, tokenize, detokenize, and those for operators.

An emulated engine has no weights, expert parallelism or sleep. Endpoints about these answer as an idle vLLM does, where
that is possible, and are not served otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from kvcache.errors import ApiError
from kvcache.model_card import model_card
from runtime.draining import DRAINING_HEADER
from worker.asgi import HttpRequest
from worker.emulator.protocol.lora import LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from worker.emulator.protocol.messages import check_parts
from worker.emulator.protocol.tokenize import (
    TOKENIZE_REQUEST,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from worker.emulator.protocol.validation import parse_request
from worker.emulator.server.rendering import Bounds, check_multimodal, check_template, conversation, encode
from worker.emulator.server.service import VLLM_VERSION, EmulatorState, Service, json_body

UNBOUNDED = 2**63
"""The bound of prompts for /tokenize, which takes any length."""


async def health(raw_request: HttpRequest, service: Service) -> None:
    """200 while requests are taken, 503 once the worker closes or its engine is dead. There is no body.

    A draining worker still answers 200, with a header that says that it drains: where there is no other endpoint, a
    terminating one gets requests as long as it is ready.
    """
    ready = service.state is not EmulatorState.CLOSING and not service.engines.dead
    draining = [(DRAINING_HEADER.encode(), b"1")] if service.state is EmulatorState.DRAINING else []
    await raw_request.reply(200 if ready else 503, b"", *draining)


async def load(raw_request: HttpRequest, service: Service) -> None:
    """The number of completion and chat requests in flight."""
    await raw_request.json(200, {"server_load": service.in_progress})


async def models(raw_request: HttpRequest, service: Service) -> None:
    served: list[tuple[str, str, str | None, int | None]] = [
        *((name, service.root, None, service.max_model_len) for name in service.names),
        *((adapter.name, adapter.path, adapter.parent, None) for adapter in service.adapters),
    ]
    listed = [
        model_card(name, created=service.started, root=root, parent=parent, max_model_len=longest)
        for name, root, parent, longest in served
    ]
    await raw_request.json(200, {"object": "list", "data": listed})


async def load_lora_adapter(raw_request: HttpRequest, service: Service) -> None:
    """Load an adapter. Raises `ApiError`."""
    request = parse_request(LoadLoraAdapterRequest, await json_body(raw_request))
    done = service.adapters.load(request.lora_name, request.lora_path, in_place=request.load_inplace)
    await raw_request.reply(200, done.encode())


async def unload_lora_adapter(raw_request: HttpRequest, service: Service) -> None:
    """Unload an adapter. Raises `ApiError`."""
    request = parse_request(UnloadLoraAdapterRequest, await json_body(raw_request))
    await raw_request.reply(200, service.adapters.unload(request.lora_name).encode())


async def tokenize(raw_request: HttpRequest, service: Service) -> None:
    """The token ids of a text or of a conversation."""
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
        check = partial(check_parts, service.model)
        return conversation(request.prompt_fields(), Bounds(UNBOUNDED), tokenizer, check)
    return encode(request.prompt, tokenizer, add_special_tokens=request.add_special_tokens)


async def detokenize(raw_request: HttpRequest, service: Service) -> None:
    """The text of token ids. Ids without a token are left out."""
    request = parse_request(DetokenizeRequest, await json_body(raw_request))
    service.check_model(request.model)
    vocabulary = range(service.tokenizer.vocab_size)
    known = [token for token in request.tokens if token in vocabulary]
    await raw_request.json(200, {"prompt": service.tokenizer.decode(known, skip_special_tokens=False)})


async def reset_prefix_cache(raw_request: HttpRequest, service: Service) -> None:
    """Drop every cached block. Refused (`success` false) while a request runs."""
    await raw_request.json(200, {"success": service.engines.reset_prefix_cache()})


_SCALE_OUT = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."


def constant(answer: Mapping[str, Any]) -> Callable[[HttpRequest, Service], Awaitable[None]]:
    """A handler that always answers with this JSON object."""

    async def handler(raw_request: HttpRequest, service: Service) -> None:
        await raw_request.json(200, answer)

    return handler


async def reset_absent_cache(raw_request: HttpRequest, service: Service) -> None:
    """Reset a cache that an emulated engine does not have."""
    await raw_request.reply(200, b"")


async def scale_out_disabled(raw_request: HttpRequest, service: Service) -> None:
    raise ApiError(403, _SCALE_OUT, type="PermissionDeniedError")


async def server_info(raw_request: HttpRequest, service: Service) -> None:
    """The settings that affect answers, as `vllm_config`. The environment is not disclosed."""
    facts: dict[str, Any] = {
        "model": service.root,
        "served_model_name": service.model,
        "max_model_len": service.max_model_len,
        "block_size": service.block_size,
        "version": VLLM_VERSION,
    }
    await raw_request.json(200, {"vllm_config": json.dumps(facts), "vllm_env": {}, "system_env": {}})


async def abort_requests(raw_request: HttpRequest, service: Service) -> None:
    """Abort the requests with these ids, or all if none is given."""
    try:
        body = json.loads(await raw_request.body())
    except ValueError:
        raise ApiError(400, "Invalid JSON format", type="Bad Request") from None
    if not isinstance(body, dict):
        raise ApiError(400, "Request body must be a JSON object", type="Bad Request")
    named = body.get("request_ids")
    await raw_request.json(200, {"status": "aborted", "aborted": service.abort(named or None)})
