"""The small endpoints: models, tokenize, detokenize, health and the like."""

from __future__ import annotations

import secrets

from runtime.draining import DRAINING_HEADER
from worker.asgi import HttpRequest
from worker.emulator.protocol.parsing import parse_request
from worker.emulator.protocol.tokenize import (
    TOKENIZE_REQUEST,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from worker.emulator.server.rendering import Bounds, check_multimodal, check_template, conversation, encode
from worker.emulator.server.service import VLLM_VERSION, Service, Stage

UNBOUNDED = 2**63
"""/tokenize takes prompts longer than any context."""


async def health(raw_request: HttpRequest, service: Service) -> None:
    """200 while requests are taken, 503 once the worker drains or its engine is dead. No body.

    A worker that leaves and still takes requests says so in a header: an endpoint that terminates is used for as long
    as it says that it is ready, where there is no other.
    """
    ready = service.stage is not Stage.DRAINING and not service.engine.dead.is_set()
    leaving = [(DRAINING_HEADER.encode(), b"1")] if service.stage is Stage.LEAVING else []
    await raw_request.reply(200 if ready else 503, b"", *leaving)


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
    raw = await raw_request.json_body()
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
    request = parse_request(DetokenizeRequest, await raw_request.json_body())
    service.check_model(request.model)
    vocabulary = range(service.tokenizer.vocab_size)
    known = [token for token in request.tokens if token in vocabulary]
    await raw_request.json(200, {"prompt": service.tokenizer.decode(known, skip_special_tokens=False)})


async def reset_prefix_cache(raw_request: HttpRequest, service: Service) -> None:
    """Forget every cached block; refused (`success` false) while a request runs."""
    await raw_request.json(200, {"success": service.engine.reset_prefix_cache()})
