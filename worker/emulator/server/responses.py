"""/v1/responses: OpenAI's Responses API.

As in vLLM, nothing is stored unless the server is told to (`--enable-responses-store`): then responses can be looked
up, continued by `previous_response_id`, made in the background, and cancelled there.

Compared with a running vLLM 0.32 (`VLLM_ENABLE_RESPONSES_API_STORE=1`): a response is found once it is complete, one in
the background from its beginning, as "queued" until it ends. Only the events of a response that is made in the
background and streamed are kept: to follow any other breaks the connection after the head. Who follows a response that
is cancelled waits for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from kvcache.chat.request import ChatRequestError
from kvcache.chat.responses import input_messages, opening, options
from kvcache.errors import ApiError, parameter_error
from runtime.http.server import AnswerAborted
from worker.asgi import HttpRequest
from worker.emulator.async_engine import EngineDeadError
from worker.emulator.protocol.messages import check_form
from worker.emulator.protocol.responses import ResponsesRequest, ResponsesResponse, is_plain
from worker.emulator.protocol.sampling import response_sampling
from worker.emulator.protocol.validation import parse_body, sanitized, validated, validated_query
from worker.emulator.server.rendering import Bounds, check_multimodal, check_template, conversation
from worker.emulator.server.response import Response, ResponseEvent
from worker.emulator.server.service import LONG_TEXT, Service, json_body
from worker.emulator.server.streaming import generated, running, stream
from worker.emulator.server.submission import Prompt, check, text_of

MAX_STORED = 1000
"""Responses that are kept; the oldest is dropped first. (vLLM keeps all.)"""

_NO_STORE = (
    "This vLLM engine does not support `store=True` and therefore does not support the background mode. To enable "
    "these features, set the environment variable `VLLM_ENABLE_RESPONSES_API_STORE=1` when launching the vLLM server."
)


@dataclass(slots=True)
class _Stored:
    response: Response
    messages: list[dict[str, Any]]
    object: dict[str, Any]
    """What a look-up finds: the response as it was at its beginning or is at its end."""
    followed: bool
    """Its events can be followed."""
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class RetrieveQuery(BaseModel):
    """The query of `GET /v1/responses/ID`."""

    starting_after: int | None = None
    stream: bool | None = False


class Responses:
    """The endpoints, and the stored responses."""

    def __init__(self, *, store: bool) -> None:
        self._keeps = store
        self._stored: OrderedDict[str, _Stored] = OrderedDict()

    async def create(self, raw_request: HttpRequest, service: Service) -> None:
        """Answer one request. Raises `ApiError` as long as nothing has been sent."""
        raw = await json_body(raw_request)
        body = parse_body(raw)
        request = await _validated(service, body)
        if isinstance(body["input"], dict):  # an empty one: vLLM reads its keys as the items
            body["input"] = []
        service.check_model(request.model)
        if request.store and not self._keeps and request.background:
            raise _invalid(_NO_STORE, "background")
        if request.previous_input_messages and request.previous_response_id:
            raise _invalid(
                "Only one of `previous_input_messages` and `previous_response_id` can be set.", "previous_response_id"
            )
        if not service.trust_request_chat_template:
            check_template(request)
        messages = self._conversation(request, body)
        prompt = await _render(service, request, {"messages": messages, **_options(body)}, len(raw))
        response = Response(service, request, prompt.tokens, prompt.sampling, int(time.time()))
        stored = _Stored(response, messages, response.object(), bool(request.background and request.stream))
        keeps = bool(request.store and self._keeps)
        try:
            ResponsesResponse(background=request.background, truncation=request.truncation)  # type: ignore[arg-type]
        except ValidationError as error:
            if not request.stream:
                raise ApiError(400, sanitized(str(error))) from None
            await raw_request.open_stream()
            raise AnswerAborted("vLLM fails after it has sent the head") from None
        if request.background:
            if keeps:
                self._keep(stored)
            await self._background(raw_request, service, request, prompt, stored)
            return
        await _answer(raw_request, service, request, prompt, response)
        if keeps and response.ended:
            stored.object = response.object()
            self._keep(stored)

    async def retrieve(self, raw_request: HttpRequest, service: Service) -> None:
        """Answer with a stored response or, with `stream`, its events from `starting_after` on."""
        stored = self._find(raw_request.path.rsplit("/", 1)[-1])
        query = validated_query(RetrieveQuery, raw_request.query)
        if not query.stream:
            await raw_request.json(200, stored.object)
            return
        await _replay(raw_request, stored, 0 if query.starting_after is None else query.starting_after + 1)

    async def cancel(self, raw_request: HttpRequest, service: Service) -> None:
        """Cancel a response that is made in the background."""
        stored = self._find(raw_request.path.rsplit("/", 2)[-2])
        if stored.response.ended:
            raise _invalid("Cannot cancel a synchronous response.", "response_id")
        stored.response.advance(ResponseEvent.CANCELLED)
        stored.object["status"] = stored.response.status
        if stored.task is not None:
            stored.task.cancel()
        await raw_request.json(200, stored.object)

    def _keep(self, stored: _Stored) -> None:
        self._stored[stored.response.id] = stored
        while len(self._stored) > MAX_STORED:
            self._stored.popitem(last=False)

    def _find(self, response_id: str) -> _Stored:
        stored = self._stored.get(response_id)
        if stored is None:
            raise _invalid(f"Response with id '{response_id}' not found.", "response_id", status=404)
        return stored

    def _conversation(self, request: ResponsesRequest, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a request, after those of the response that it continues. Raises `ApiError`."""
        messages = opening(request.instructions)
        if request.previous_response_id is not None:
            before = self._find(request.previous_response_id)
            messages += [message for message in before.messages if message["role"] != "system"]
            messages += [
                {"role": "assistant", "content": part["text"]}
                for item in before.object["output"]
                for part in item.get("content") or ()
            ]
        try:
            return messages + input_messages(body)
        except ChatRequestError as error:
            raise parameter_error(str(error), error.param or "input") from None

    async def _background(
        self, raw_request: HttpRequest, service: Service, request: ResponsesRequest, prompt: Prompt, stored: _Stored
    ) -> None:
        queued = dict(stored.object)
        stored.task = asyncio.create_task(_generate(service, request, prompt, stored))
        if request.stream:
            await _replay(raw_request, stored, 0)
        else:
            await raw_request.json(200, queued)


async def _validated(service: Service, body: Any) -> ResponsesRequest:
    """The request in a body. Raises `ApiError`."""
    if is_plain(body):
        return validated(ResponsesRequest, body)
    return validated(await service.offload(LONG_TEXT, _typed_request), body)


def _typed_request() -> type[ResponsesRequest]:
    """The request with OpenAI's types, which are loaded for the first body that needs them."""
    from worker.emulator.protocol.openai_types import TypedResponsesRequest

    return TypedResponsesRequest


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return options(body)
    except ChatRequestError as error:
        raise parameter_error(str(error), error.param or "input") from None


async def _render(service: Service, request: ResponsesRequest, fields: Mapping[str, Any], size: int) -> Prompt:
    """The prompt with its sampling parameters. Raises `ApiError`."""
    check_multimodal(request)
    cut = None if request.truncation == "disabled" else -1
    bounds = Bounds(service.max_model_len, request.max_output_tokens, "max_output_tokens", cut)
    check = partial(_check_contents, service.model)
    tokens = await service.offload(size, lambda: conversation(fields, bounds, service.tokenizer, check))
    if len(tokens) >= service.max_model_len:
        raise _invalid(
            f"The engine prompt length {len(tokens)} exceeds the max_model_len {service.max_model_len}. Please reduce "
            "prompt.",
            "input",
        )
    return Prompt(tokens, response_sampling(request, bounds.room(len(tokens))))


def _check_contents(model: str, messages: Sequence[Any]) -> None:
    for message in messages:
        check_form(model, message.get("content"))


async def _answer(
    raw_request: HttpRequest, service: Service, request: ResponsesRequest, prompt: Prompt, response: Response
) -> None:
    opening = response.begin() if request.stream else b""
    async with generated(
        raw_request,
        service,
        [prompt],
        service.scope(request.model, request.cache_salt),
        response.id,
        streaming=bool(request.stream),
        failure=lambda error: opening,  # vLLM ends the stream there
    ) as generation:
        if generation is None:
            return
        if request.stream:
            await stream(raw_request, generation, response, opening=opening, done=b"")
            return
        await generation.finished()
        choice = generation.choices[0]
        await raw_request.json(200, response.finish(choice, text_of(service, prompt.sampling, choice)))


async def _generate(service: Service, request: ResponsesRequest, prompt: Prompt, stored: _Stored) -> None:
    """Generate a response in the background, and wake up the streams that follow it."""
    response = stored.response
    try:
        check(service, [prompt], rank=None)
        response.advance(ResponseEvent.STARTED)
        response.begin()
        stored.changed.set()
        with running(
            service, [prompt], service.scope(request.model, request.cache_salt), response.id, streaming=True
        ) as generation:
            while updates := await generation.updates():
                for choice in updates:
                    response.token(choice)
                stored.changed.set()
            response.last(generation.choices)
        stored.object = response.object()
    except (ApiError, EngineDeadError):
        response.advance(ResponseEvent.FAILED)
        stored.object["status"] = response.status
    finally:
        stored.changed.set()


async def _replay(raw_request: HttpRequest, stored: _Stored, begin: int) -> None:
    """Stream the events of a response from number `begin` on, until it is complete."""
    await raw_request.open_stream()
    if not stored.followed:
        raise AnswerAborted("the events of this response are not kept")
    while True:
        stored.changed.clear()
        events = stored.response.events[begin:]
        begin += len(events)
        if stored.response.complete:
            await raw_request.close_stream(b"".join(events))
            return
        await raw_request.write(b"".join(events))
        await stored.changed.wait()


def _invalid(message: str, param: str, status: int = 400) -> ApiError:
    return ApiError(status, message, param=param, type="invalid_request_error")
