"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError

from kvcache.chat.anthropic import chat_fields
from kvcache.chat.request import ChatRequestError
from kvcache.errors import ApiError, MessagesError, messages_error
from worker.asgi import HttpRequest
from worker.emulator.protocol.anthropic import CountTokensRequest, MessagesRequest
from worker.emulator.protocol.base import StreamOptions
from worker.emulator.protocol.chat import ChatCompletionRequest, NamedToolChoice, ToolParam
from worker.emulator.protocol.structured_outputs import ResponseFormat
from worker.emulator.protocol.validation import parse_body, sanitized, validated
from worker.emulator.server.chat import render
from worker.emulator.server.generation import Choice, created_cache_tokens
from worker.emulator.server.service import Service, json_body, named_rank, request_id
from worker.emulator.server.streaming import generated, stream
from worker.emulator.server.submission import text_of


async def messages(raw_request: HttpRequest, service: Service) -> None:
    """Answer one request. Raises `ApiError` as long as nothing has been sent."""
    raw = await json_body(raw_request)
    body = parse_body(raw)
    request = validated(MessagesRequest, body)
    try:
        await _answer(raw_request, service, _as_chat(request, body, service), len(raw))
    except ApiError as error:
        raise MessagesError(error) from None


async def count_tokens(raw_request: HttpRequest, service: Service) -> None:
    """Count the tokens of a prompt. Raises `ApiError`."""
    raw = await json_body(raw_request)
    body = parse_body(raw)
    request = validated(CountTokensRequest, body)
    try:
        chat = _as_chat(request, body, service)
        service.check_model(chat.model)
        prompt = await render(service, chat, len(raw))
    except ApiError as error:
        raise MessagesError(error) from None
    tokens = len(prompt.tokens)
    await raw_request.json(200, {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}})


def _as_chat(
    request: MessagesRequest | CountTokensRequest, body: Mapping[str, Any], service: Service
) -> ChatCompletionRequest:
    """The chat request that a body stands for. Raises `ApiError`."""
    known = {name: body[name] for name in type(request).model_fields if name in body}
    try:
        fields = chat_fields(known, service.tokenizer.chat, call_id=f"call_{int(time.time())}")
    except ChatRequestError as error:
        raise ApiError(400, str(error)) from None
    later = {name: fields.pop(name, None) for name in _UNCHECKED}
    chat = ChatCompletionRequest.model_validate(fields)
    # vLLM sets these on the valid request: what it checks of their combinations in a chat request is not checked here.
    chat.stream = isinstance(request, MessagesRequest) and request.stream
    chat.stream_options = StreamOptions(include_usage=True, continuous_usage_stats=True) if chat.stream else None
    chat.reasoning_effort = later["reasoning_effort"]
    chat.thinking_token_budget = later["thinking_token_budget"]
    if (form := later["response_format"]) is not None:
        chat.response_format = ResponseFormat.model_validate(form)
    choice, tools = later["tool_choice"], later["tools"]
    chat.tool_choice = NamedToolChoice.model_validate(choice) if isinstance(choice, dict) else choice
    if tools is not None:
        chat.tools = [ToolParam.model_validate(tool) for tool in tools]
    return chat


_UNCHECKED = ("stream", "stream_options", "response_format", "reasoning_effort", "thinking_token_budget", "tool_choice",
              "tools", "parallel_tool_calls")  # fmt: skip


async def _answer(raw_request: HttpRequest, service: Service, chat: ChatCompletionRequest, size: int) -> None:
    service.check_model(chat.model)
    prompt = await render(service, chat, size)
    model = service.answered_as(chat.model)
    answer_id = request_id(raw_request, "chatcmpl", chat.request_id)
    async with generated(
        raw_request,
        service,
        [prompt],
        service.scope(chat.model, chat.cache_salt),
        answer_id,
        streaming=bool(chat.stream),
        rank=named_rank(raw_request),
        failure=_failure,
    ) as generation:
        if generation is None:
            return
        if chat.stream:
            await stream(raw_request, generation, _Events(model, service, answer_id), done=b"", failure=_failure)
            return
        await generation.finished()
        choice = generation.choices[0]
        reason, sequence = _stop(choice)
        answer = {
            "id": answer_id,
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": text_of(service, prompt.sampling, choice)}],
            "model": model,
            "stop_reason": reason,
            **({} if sequence is None else {"stop_sequence": sequence}),
            "usage": _usage(service, choice, len(choice.tokens)),
        }
        await raw_request.json(200, answer)


def _stop(choice: Choice) -> tuple[str | None, str | None]:
    """`stop_reason`, and the stop string that ended the answer."""
    if choice.finish_reason == "length":
        return "max_tokens", None
    if choice.finish_reason != "stop":
        return None, None
    return ("stop_sequence", choice.stop_reason) if isinstance(choice.stop_reason, str) else ("end_turn", None)


def _usage(service: Service, choice: Choice, output: int) -> dict[str, int]:
    """`usage`. Tokens read from the cache or written to it are no part of Anthropic's `input_tokens`."""
    read, created = choice.cached_tokens, created_cache_tokens(choice, service.block_size)
    if not service.prompt_tokens_details:
        return {"input_tokens": choice.prompt_tokens, "output_tokens": output}
    return {
        "input_tokens": max(0, choice.prompt_tokens - read - created),
        "output_tokens": output,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
    }


class ChatCompletionStreamResponse(BaseModel):
    """An event of a chat's stream, which vLLM makes an event of this API. (The name appears in error messages.)"""

    model: str
    choices: list[Any]


def _failure(error: ApiError) -> bytes:
    """A failure within a stream. vLLM reads the chat's error event as an answer, and reports that it is none."""
    try:
        ChatCompletionStreamResponse.model_validate(error.body())
    except ValidationError as unread:
        return messages_error(sanitized(str(unread)))
    raise AssertionError("an error is no answer")


class _Events:
    """Writes the events of a stream. Its only content block is opened with the first text."""

    def __init__(self, model: str, service: Service, answer_id: str) -> None:
        self._model = model
        self._service = service
        self._answer_id = answer_id
        self._open = False

    def first(self, choices: Sequence[Choice]) -> bytes:
        message: dict[str, Any] = {
            "id": self._answer_id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": choices[0].prompt_tokens, "output_tokens": 0},
        }
        return _event("message_start", message=message)

    def token(self, choice: Choice) -> bytes:
        text, _ = choice.take()
        if not text:
            return b""
        events = (
            [] if self._open else [_event("content_block_start", content_block={"type": "text", "text": ""}, index=0)]
        )
        self._open = True
        return b"".join((*events, _event("content_block_delta", delta={"type": "text_delta", "text": text}, index=0)))

    def last(self, choices: Sequence[Choice]) -> bytes:
        choice = choices[0]
        # A request that is aborted before its first token ends no other way.
        reason, sequence = _stop(choice) if choice.tokens else ("end_turn", None)
        return b"".join(
            (
                _event("content_block_stop", index=0) if self._open else b"",
                _event(
                    "message_delta",
                    delta={"stop_reason": reason, "stop_sequence": sequence},
                    usage=_usage(self._service, choice, len(choice.tokens)),
                ),
                _event("message_stop"),
            )
        )


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))
