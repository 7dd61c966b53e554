"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from kvcache.prompts import completion_prompts, request_scope
from kvcache.wire import CompletionRequest, parse_request
from worker.server.generation import Choice, Generation
from worker.server.http import Exchange
from worker.server.service import Service, request_id
from worker.server.streaming import stream
from worker.server.usage import totals, usage


async def completions(exchange: Exchange, service: Service) -> None:
    """Answer one completion request. Raises `ApiError` as long as nothing has been sent."""
    raw = await exchange.json_body()
    request = parse_request(CompletionRequest, raw)
    service.check_model(request.model)
    service.check_output_limit(request.max_tokens)
    scope, prompts = await service.tokenize(
        len(raw) if _has_text(request.prompt) else 0,
        lambda: (
            request_scope({"cache_salt": request.cache_salt}),
            completion_prompts(request.prompt, service.tokenizer),
        ),
    )
    as_text = [isinstance(prompt, str) for prompt in _listed(request.prompt)]
    limits = [
        service.output_limit(len(prompt), request.max_tokens, text=text)
        for prompt, text in zip(prompts, as_text, strict=True)
    ]
    answer_id = request_id(exchange, "cmpl", request.request_id)
    with service.generation(request) as generation:
        service.start(generation, request, prompts, limits, scope)
        created = int(time.time())
        if request.stream:
            await stream(exchange, generation, _Chunks(service, request, answer_id, created))
        else:
            await generation.finished()
            await exchange.json(200, _answer(service, request, generation, answer_id, created))


def _has_text(prompt: object) -> bool:
    """Whether anything is to be tokenised; ids are only checked."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str))


def _listed(prompt: object) -> list[object]:
    """A request's prompts, each as it came."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _prompt_text(service: Service, request: CompletionRequest, choice: Choice) -> str:
    prompt = _listed(request.prompt)[choice.index // request.n]
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(choice.prompt)


def _answer(
    service: Service, request: CompletionRequest, generation: Generation, answer_id: str, created: int
) -> dict[str, Any]:
    prompt, completion, cached = totals(generation.choices, request.n)
    details = {"cached_tokens": cached, "created_cache_tokens": None, "multimodal_tokens": None}
    return {
        "id": answer_id,
        "object": "text_completion",
        "created": created,
        "model": service.model,
        "choices": [_choice(service, request, choice) for choice in generation.choices],
        "service_tier": None,
        "system_fingerprint": service.fingerprint,
        "usage": {
            **usage(prompt, completion),
            "prompt_tokens_details": details if service.prompt_tokens_details else None,
            "completion_tokens_details": None,
        },
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _choice(service: Service, request: CompletionRequest, choice: Choice) -> dict[str, Any]:
    text = service.text_of(choice, request)
    return {
        "index": choice.index,
        "text": _prompt_text(service, request, choice) + text if request.echo else text,
        "logprobs": None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.tokens if request.return_token_ids else None,
        "prompt_logprobs": None,
        "prompt_token_ids": choice.prompt if request.return_token_ids else None,
        "routed_experts": None,
    }


class _Chunks:
    """The stream's chunks. What is the same in all of them is formatted once: a token costs one join."""

    def __init__(self, service: Service, request: CompletionRequest, answer_id: str, created: int) -> None:
        self._service = service
        self._request = request
        self._head = b'data: {"id":%s,"object":"text_completion","created":%d,"model":%s,"choices":[' % (
            orjson.dumps(answer_id),
            created,
            orjson.dumps(service.model),
        )
        self._fingerprint = b',"system_fingerprint":' + orjson.dumps(service.fingerprint)
        self._plain = not (request.return_token_ids or request.continuous_usage or request.echo)
        self._heads: dict[int, bytes] = {}

    def token(self, choice: Choice, *, last: bool) -> bytes:
        """What is new of a choice. `last`: of all chunks of the stream, but for a usage chunk."""
        text, tokens = choice.take()
        head = self._heads.get(choice.index)
        first = head is None
        if head is None:
            head = self._heads[choice.index] = self._head + b'{"index":%d,"text":' % choice.index
        if choice.finish_reason is None and self._plain:
            return head + orjson.dumps(text) + _PLAIN_TAIL
        request = self._request
        if first and request.echo:
            text = _prompt_text(self._service, request, choice) + text
        with_ids = request.return_token_ids
        parts = [
            head,
            orjson.dumps(text),
            b',"logprobs":null,"finish_reason":%s,"stop_reason":%s,"prompt_token_ids":%s,"token_ids":%s}]'
            % (
                orjson.dumps(choice.finish_reason),
                orjson.dumps(choice.stop_reason),
                orjson.dumps(choice.prompt if first and with_ids else None),
                orjson.dumps(tokens if with_ids else None),
            ),
        ]
        if request.continuous_usage:
            parts.append(b',"usage":' + orjson.dumps(usage(choice.prompt_tokens, len(choice.tokens))))
        elif last and not request.include_usage:
            parts.append(self._fingerprint)
        return b"".join((*parts, b"}\n\n"))

    def first(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage chunk, if it was asked for."""
        if not self._request.include_usage:
            return b""
        prompt, completion, cached = totals(choices, self._request.n)
        counts = usage(prompt, completion)
        if self._service.prompt_tokens_details:
            counts["prompt_tokens_details"] = {"cached_tokens": cached}
        return self._head + b'],"usage":' + orjson.dumps(counts) + self._fingerprint + b"}\n\n"


_PLAIN_TAIL = (
    b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
)
