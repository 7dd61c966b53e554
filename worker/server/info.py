"""The small endpoints: models, tokenize, detokenize, health and the like."""

from __future__ import annotations

import secrets

from kvcache.errors import ApiError
from kvcache.prompts import chat_prompt
from kvcache.tokenizer import TokenizerError
from kvcache.wire import DetokenizeRequest, TokenizeRequest, parse_request
from worker.server.http import Exchange
from worker.server.service import VLLM_VERSION, Service


async def health(exchange: Exchange, service: Service) -> None:
    """200 while requests are taken, 503 once the worker drains or its engine is dead. No body."""
    ready = not service.draining and not service.runner.dead.is_set()
    await exchange.reply(200 if ready else 503, b"")


async def version(exchange: Exchange, service: Service) -> None:
    await exchange.json(200, {"version": VLLM_VERSION})


async def load(exchange: Exchange, service: Service) -> None:
    """Completion and chat requests under way."""
    await exchange.json(200, {"server_load": service.in_progress})


async def models(exchange: Exchange, service: Service) -> None:
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
    model = {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "vllm",
        "root": service.root,
        "parent": None,
        "max_model_len": service.max_model_len,
        "permission": [permission],
    }
    await exchange.json(200, {"object": "list", "data": [model]})


async def tokenize(exchange: Exchange, service: Service) -> None:
    """Token ids of a text or of a chat's messages."""
    raw = await exchange.json_body()
    request = parse_request(TokenizeRequest, raw)
    service.check_model(request.model)
    tokens = await service.tokenize(len(raw), lambda: _tokens(request, service))
    strings = [service.tokenizer.token_str(token) for token in tokens] if request.return_token_strs else None
    await exchange.json(
        200,
        {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens, "token_strs": strings},
    )


def _tokens(request: TokenizeRequest, service: Service) -> list[int]:
    tokenizer = service.tokenizer
    if request.messages is not None:
        return chat_prompt(request.messages, tokenizer, add_generation_prompt=request.add_generation_prompt)
    try:
        return tokenizer.encode(request.prompt or "", add_special_tokens=request.add_special_tokens)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="prompt") from None


async def detokenize(exchange: Exchange, service: Service) -> None:
    """Text of token ids."""
    request = parse_request(DetokenizeRequest, await exchange.json_body())
    service.check_model(request.model)
    vocabulary = range(service.tokenizer.vocab_size)
    for token in request.tokens:
        if token not in vocabulary:
            raise ApiError(400, f"Token id {token} is out of vocabulary")
    text = service.tokenizer.decode(request.tokens, skip_special_tokens=False)
    await exchange.json(200, {"prompt": text})


async def reset_prefix_cache(exchange: Exchange, service: Service) -> None:
    """Forget every cached block; refused (`success` false) while a request runs."""
    await exchange.json(200, {"success": service.runner.reset_prefix_cache()})
