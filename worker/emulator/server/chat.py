"""POST /v1/chat/completions and /v1/chat/completions/batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from kvcache.errors import ApiError
from kvcache.images import image_parts
from worker.asgi import HttpRequest
from worker.emulator.protocol.chat import BatchChatCompletionRequest, ChatCompletionRequest, NamedToolChoice
from worker.emulator.protocol.messages import check_parts
from worker.emulator.protocol.sampling import sampling_of
from worker.emulator.protocol.validation import parse_request
from worker.emulator.server.generation import Choice, Generation, created_cache_tokens, totals, usage
from worker.emulator.server.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from worker.emulator.server.rendering import (
    Bounds,
    check_multimodal,
    check_template,
    conversation,
    image_conversation,
)
from worker.emulator.server.service import Service, json_body, named_rank, request_id
from worker.emulator.server.streaming import OpenAIChunks, generated, respond
from worker.emulator.server.submission import Prompt, text_of


async def chat_completions(raw_request: HttpRequest, service: Service) -> None:
    """Answer one chat request. Raises `ApiError` as long as nothing has been sent."""
    raw = await json_body(raw_request)
    await chat(raw_request, service, parse_request(ChatCompletionRequest, raw), len(raw))


async def chat(raw_request: HttpRequest, service: Service, request: ChatCompletionRequest, size: int) -> None:
    """Answer a request that has been read from `size` bytes. Raises `ApiError` as long as nothing has been sent."""
    service.check_model(request.model)
    prompt = await render(service, request, size)
    answer_id = request_id(raw_request, "chatcmpl", request.request_id)
    answer = _Answer(service, request, prompt, answer_id, int(time.time()))
    await respond(raw_request, service, request, [prompt], answer)


async def batch_chat_completions(raw_request: HttpRequest, service: Service) -> None:
    """Answer each of several conversations once. Raises `ApiError`."""
    raw = await json_body(raw_request)
    batch = parse_request(BatchChatCompletionRequest, raw)
    service.check_model(batch.model)
    requests = batch.requests()
    prompts = [await render(service, request, len(raw)) for request in requests]
    answer_id = request_id(raw_request, "chatcmpl", batch.request_id)
    created = int(time.time())
    scope = service.scope(batch.model, batch.cache_salt)
    rank = named_rank(raw_request)
    async with generated(raw_request, service, prompts, scope, answer_id, streaming=False, rank=rank) as generation:
        if generation is None:
            return
        await generation.finished()
        answers = [
            _Answer(service, request, prompt, answer_id, created)
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        whole = answers[0].whole(generation)
        whole["choices"] = [answer.choice(choice) for answer, choice in zip(answers, generation.choices, strict=True)]
        whole["usage"] |= usage(*totals(generation.choices, 1)) | {"prompt_tokens_details": None}
        await raw_request.json(200, whole)


async def render(service: Service, request: ChatCompletionRequest, size: int) -> Prompt:
    """The prompt of a chat request with its sampling parameters. Raises `ApiError`."""
    _check_tools(service, request)
    if not service.trust_request_chat_template:
        check_template(request)
    check_multimodal(request)
    bounds = Bounds(
        service.max_model_len,
        request.output_limit,
        request.output_limit_name,
        request.truncate_prompt_tokens,
        request.truncation_side,
    )
    check = partial(check_parts, service.model)
    rule = service.images
    if rule is not None and any(image_parts(request.messages)):
        fields = request.prompt_fields()
        read = await service.offload(size, lambda: image_conversation(fields, bounds, service.tokenizer, check, rule))
        return Prompt(read.tokens, sampling_of(request, bounds.room(read.length)), read.images)
    tokens = await service.offload(
        size, lambda: conversation(request.prompt_fields(), bounds, service.tokenizer, check)
    )
    return Prompt(tokens, sampling_of(request, bounds.room(len(tokens))))


def _check_tools(service: Service, request: ChatCompletionRequest) -> None:
    """Raises `ApiError` for a tool choice that needs a parser of tool calls."""
    choice = request.tool_choice
    if choice in (None, "none"):
        return
    if choice == "auto":
        if not service.auto_tool_choice:
            raise ApiError(
                400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
            )
        return
    named = f'function "{choice.function.name}"' if isinstance(choice, NamedToolChoice) else f'"{choice}"'
    raise ApiError(400, f"tool_choice={named} requires --tool-call-parser to be set")


class _Answer:
    """Writes the parts of one answer."""

    def __init__(
        self, service: Service, request: ChatCompletionRequest, prompt: Prompt, answer_id: str, created: int
    ) -> None:
        self.service = service
        self.request = request
        self.model = service.answered_as(request.model)
        self.sampling = prompt.sampling
        self.answer_id = answer_id
        self.created = created
        self._last: Mapping[str, Any] = dict(request.messages[-1])
        self.role: str = "assistant" if request.add_generation_prompt else self._last["role"]
        self._prompt = prompt
        self._texts = TokenTexts(service.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))

    @property
    def echo(self) -> str:
        """The text of an echo: the last message, if its role is that of the answer."""
        last = self._last
        if not self.request.echo or last.get("role") != self.role:
            return ""
        content = last.get("content")
        if isinstance(content, list):
            return "\n".join(part if isinstance(part, str) else part.get("text", "") for part in content)
        return content or ""

    @property
    def prompt_text(self) -> str | None:
        """The rendered prompt, if the request asks for it."""
        if not self.request.return_prompt_text:
            return None
        return self.service.tokenizer.decode(self._prompt.tokens, skip_special_tokens=False)

    def logprobs(self, choice: Choice, tokens: int) -> dict[str, Any] | None:
        """`logprobs` of the last `tokens` tokens of a choice."""
        request = self.request
        if not request.logprobs:
            return None
        top = -1 if request.logprob_token_ids else request.top_logprobs
        return chat_logprobs(choice.logprobs(tokens), top, self._texts)

    def details(self, choice: Choice) -> dict[str, int]:
        """Cached prompt tokens, and those that were added to the cache."""
        return {
            "cached_tokens": choice.cached_tokens,
            "created_cache_tokens": created_cache_tokens(choice, self.service.block_size),
        }

    def formatter(self) -> _ChunkFormatter:
        return _ChunkFormatter(self)

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The whole answer, for a request that does not stream."""
        service, request, sampling = self.service, self.request, self.sampling
        choices = generation.choices
        prompt, completion = totals(choices, sampling.n)
        last = generation.last or choices[-1]
        asked = sampling.prompt_logprobs is not None and not sampling.beam
        return {
            "id": self.answer_id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(choice) for choice in choices],
            "service_tier": None,
            "system_fingerprint": service.fingerprint,
            "usage": {
                **usage(prompt, completion),
                "prompt_tokens_details": (
                    {**self.details(last), "multimodal_tokens": None}
                    if service.prompt_tokens_details and not sampling.beam
                    else None
                ),
                "completion_tokens_details": None,
            },
            "prompt_logprobs": (
                prompt_logprobs(choices[0].answer.prompt_logprobs(), TokenTexts(service.tokenizer)) if asked else None
            ),
            "prompt_token_ids": choices[0].prompt if request.return_token_ids else None,
            "prompt_text": self.prompt_text,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {
                "role": self.role,
                "content": self.echo + text_of(self.service, self.sampling, choice),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": self.logprobs(choice, len(choice.tokens)),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.tokens if self.request.return_token_ids else None,
            "routed_experts": None,
        }


class _ChunkFormatter:
    """Writes the chunks of a stream."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._service = service = answer.service
        self._request = request = answer.request
        self._shared = OpenAIChunks(
            service, answer.model, answer.answer_id, answer.created, b"chat.completion.chunk", request.stream_options
        )
        self._plain = not (request.return_token_ids or self._shared.continuous_usage or request.logprobs)
        self._heads: dict[int, bytes] = {}

    def first(self, choices: Sequence[Choice]) -> bytes:
        """The chunks with the role of each choice, and those of an echo."""
        roles = [self._opening(choice) for choice in choices]
        echo = self._answer.echo
        return b"".join((*roles, *((self._echo(choice, echo) for choice in choices) if echo else ())))

    def _opening(self, choice: Choice) -> bytes:
        return b"".join(
            (
                self._shared.head,
                b'{"index":%d,"delta":{"role":%s,"content":""},"logprobs":null,"finish_reason":null}]'
                % (choice.index, orjson.dumps(self._answer.role)),
                self._usage_so_far(choice, 0),
                b',"prompt_token_ids":',
                orjson.dumps(choice.prompt if self._request.return_token_ids else None),
                b',"prompt_text":%s}\n\n' % orjson.dumps(self._answer.prompt_text),
            )
        )

    def _echo(self, choice: Choice, text: str) -> bytes:
        delta = b'{"index":%d,"delta":{"content":%s},"logprobs":null,"finish_reason":null}]'
        return b"".join(
            (self._shared.head, delta % (choice.index, orjson.dumps(text)), self._usage_so_far(choice, 0), b"}\n\n")
        )

    def _usage_so_far(self, choice: Choice, tokens: int) -> bytes:
        if not self._shared.continuous_usage:
            return b""
        counts = usage(choice.prompt_tokens, tokens) | {"completion_tokens_details": None}
        return b',"usage":' + orjson.dumps(counts)

    def token(self, choice: Choice) -> bytes:
        """The chunk with what is new of a choice."""
        text, tokens = choice.take()
        head = self._heads.get(choice.index)
        if head is None:
            head = self._heads[choice.index] = self._shared.head + b'{"index":%d,"delta":{"content":' % choice.index
        if choice.finish_reason is None and self._plain:
            return head + orjson.dumps(text) + _PLAIN_TAIL
        parts = [
            head,
            orjson.dumps(text),
            b'},"logprobs":',
            orjson.dumps(self._answer.logprobs(choice, len(tokens))),
            b',"finish_reason":',
            orjson.dumps(choice.finish_reason),
        ]
        if choice.finish_reason is not None:
            parts += [b',"stop_reason":', orjson.dumps(choice.stop_reason)]
        parts += [b',"token_ids":', orjson.dumps(tokens if self._request.return_token_ids else None), b"}]"]
        if self._shared.continuous_usage:
            parts.append(self._usage_so_far(choice, len(choice.tokens)))
        elif choice.finish_reason is not None and not self._shared.usage:
            parts.append(self._shared.fingerprint)
        return b"".join((*parts, b"}\n\n"))

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage chunk, if the request asks for it."""
        if not self._shared.usage:
            return b""
        counts = usage(*totals(choices, self._answer.sampling.n))
        if self._service.prompt_tokens_details and not self._answer.sampling.beam:
            counts["prompt_tokens_details"] = self._answer.details(choices[0])
        return self._shared.usage_chunk(counts)


_PLAIN_TAIL = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
