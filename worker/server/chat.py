"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from kvcache.prompts import chat_prompt, request_scope
from kvcache.wire import ChatCompletionRequest, parse_request
from worker.server.generation import Choice, Generation
from worker.server.http import Exchange
from worker.server.service import Service, request_id
from worker.server.streaming import stream
from worker.server.usage import created_cache_tokens, totals, usage


async def chat_completions(exchange: Exchange, service: Service) -> None:
    """Answer one chat request. Raises `ApiError` as long as nothing has been sent."""
    raw = await exchange.json_body()
    request = parse_request(ChatCompletionRequest, raw)
    service.check_model(request.model)
    service.check_output_limit(request.output_limit)
    scope, prompt = await service.tokenize(
        len(raw),
        lambda: (
            request_scope({"cache_salt": request.cache_salt}),
            chat_prompt(request.messages, service.tokenizer, add_generation_prompt=request.add_generation_prompt),
        ),
    )
    limit = service.output_limit(len(prompt), request.output_limit, text=True)
    answer_id = request_id(exchange, "chatcmpl", request.request_id)
    with service.generation(request) as generation:
        service.start(generation, request, [prompt], [limit], scope)
        created = int(time.time())
        if request.stream:
            await stream(exchange, generation, _Chunks(service, request, answer_id, created))
        else:
            await generation.finished()
            await exchange.json(200, _answer(service, request, generation, answer_id, created))


def _answer(
    service: Service, request: ChatCompletionRequest, generation: Generation, answer_id: str, created: int
) -> dict[str, Any]:
    choices = generation.choices
    prompt, completion, cached = totals(choices, request.n)
    details = {
        "cached_tokens": cached,
        "created_cache_tokens": created_cache_tokens(choices, request.n, service.block_size),
        "multimodal_tokens": None,
    }
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": service.model,
        "choices": [_choice(service, request, choice) for choice in choices],
        "service_tier": None,
        "system_fingerprint": service.fingerprint,
        "usage": {
            **usage(prompt, completion),
            "prompt_tokens_details": details if service.prompt_tokens_details else None,
            "completion_tokens_details": None,
        },
        "prompt_logprobs": None,
        "prompt_token_ids": choices[0].prompt if request.return_token_ids else None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _choice(service: Service, request: ChatCompletionRequest, choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {
            "role": "assistant",
            "content": service.text_of(choice, request),
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        },
        "logprobs": None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.tokens if request.return_token_ids else None,
        "routed_experts": None,
    }


class _Chunks:
    """The stream's chunks. What is the same in all of them is formatted once: a token costs one join."""

    def __init__(self, service: Service, request: ChatCompletionRequest, answer_id: str, created: int) -> None:
        self._service = service
        self._request = request
        self._head = b'data: {"id":%s,"object":"chat.completion.chunk","created":%d,"model":%s,"choices":[' % (
            orjson.dumps(answer_id),
            created,
            orjson.dumps(service.model),
        )
        self._fingerprint = b',"system_fingerprint":' + orjson.dumps(service.fingerprint)
        self._plain = not (request.return_token_ids or request.continuous_usage)
        self._heads: dict[int, bytes] = {}

    def first(self, choices: Sequence[Choice]) -> bytes:
        """Who speaks, for each choice."""
        return b"".join([self._role(choice) for choice in choices])

    def _role(self, choice: Choice) -> bytes:
        request = self._request
        counts = orjson.dumps(usage(choice.prompt_tokens, 0)) if request.continuous_usage else None
        return b"".join(
            (
                self._head,
                b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
                % choice.index,
                b"" if counts is None else b',"usage":' + counts,
                b',"prompt_token_ids":',
                orjson.dumps(choice.prompt if request.return_token_ids else None),
                b',"prompt_text":null}\n\n',
            )
        )

    def token(self, choice: Choice, *, last: bool) -> bytes:
        """What is new of a choice. `last`: of all chunks of the stream, but for a usage chunk."""
        text, tokens = choice.take()
        head = self._heads.get(choice.index)
        if head is None:
            head = self._heads[choice.index] = self._head + b'{"index":%d,"delta":{"content":' % choice.index
        if choice.finish_reason is None and self._plain:
            return head + orjson.dumps(text) + _PLAIN_TAIL
        request = self._request
        parts = [head, orjson.dumps(text), b'},"logprobs":null,"finish_reason":', orjson.dumps(choice.finish_reason)]
        if choice.finish_reason is not None:
            parts += [b',"stop_reason":', orjson.dumps(choice.stop_reason)]
        parts += [b',"token_ids":', orjson.dumps(tokens if request.return_token_ids else None), b"}]"]
        if request.continuous_usage:
            parts += [b',"usage":', orjson.dumps(usage(choice.prompt_tokens, len(choice.tokens)))]
        elif last and not request.include_usage:
            parts.append(self._fingerprint)
        return b"".join((*parts, b"}\n\n"))

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage chunk, if it was asked for."""
        if not self._request.include_usage:
            return b""
        n = self._request.n
        prompt, completion, cached = totals(choices, n)
        counts = usage(prompt, completion)
        if self._service.prompt_tokens_details:
            created = created_cache_tokens(choices, n, self._service.block_size)
            counts["prompt_tokens_details"] = {"cached_tokens": cached, "created_cache_tokens": created}
        return self._head + b'],"usage":' + orjson.dumps(counts) + self._fingerprint + b"}\n\n"


_PLAIN_TAIL = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
