"""A response of the Responses API: its status, its object, and the events of its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, StrEnum, auto
from typing import Any

import orjson

from worker.emulator.protocol.base import random_id
from worker.emulator.protocol.responses import ResponsesRequest, shown_tools
from worker.emulator.protocol.sampling import Sampling
from worker.emulator.server.generation import Choice, created_cache_tokens
from worker.emulator.server.logprobs import TokenTexts, chat_logprobs
from worker.emulator.server.service import Service


class ResponseStatus(StrEnum):
    """`status` of a response, as OpenAI's API names it."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    """It ended at `max_output_tokens`."""
    CANCELLED = "cancelled"
    FAILED = "failed"


class ResponseEvent(Enum):
    """What changes the status of a response."""

    STARTED = auto()
    COMPLETED = auto()
    TOKENS_EXHAUSTED = auto()
    CANCELLED = auto()
    FAILED = auto()


RESPONSE_TRANSITIONS: Mapping[tuple[ResponseStatus, ResponseEvent], ResponseStatus] = {
    (ResponseStatus.QUEUED, ResponseEvent.STARTED): ResponseStatus.IN_PROGRESS,
    (ResponseStatus.QUEUED, ResponseEvent.CANCELLED): ResponseStatus.CANCELLED,
    (ResponseStatus.QUEUED, ResponseEvent.FAILED): ResponseStatus.FAILED,
    (ResponseStatus.IN_PROGRESS, ResponseEvent.COMPLETED): ResponseStatus.COMPLETED,
    (ResponseStatus.IN_PROGRESS, ResponseEvent.TOKENS_EXHAUSTED): ResponseStatus.INCOMPLETE,
    (ResponseStatus.IN_PROGRESS, ResponseEvent.CANCELLED): ResponseStatus.CANCELLED,
    (ResponseStatus.IN_PROGRESS, ResponseEvent.FAILED): ResponseStatus.FAILED,
    # The generation of a cancelled response may still end or fail.
    **{(ResponseStatus.CANCELLED, event): ResponseStatus.CANCELLED for event in ResponseEvent},
}


class Response:
    """A response to one request. In the background it is queued first."""

    def __init__(
        self, service: Service, request: ResponsesRequest, prompt: Sequence[int], sampling: Sampling, created: int
    ) -> None:
        self.id = request.request_id
        self.status = ResponseStatus.QUEUED if request.background else ResponseStatus.IN_PROGRESS
        self.output: list[dict[str, Any]] = []
        self.events: list[bytes] = []
        """The events of the stream so far, as they are sent."""
        self._service = service
        self._request = request
        self._model = service.answered_as(request.model)
        self._sampling = sampling
        self._created = created
        self._prompt = prompt
        self._tools = shown_tools(request.tools)
        self._item_id = f"msg_{random_id()}"
        self._texts = TokenTexts(service.tokenizer)
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._open = False
        self._choice: Choice | None = None

    @property
    def ended(self) -> bool:
        return self.status not in (ResponseStatus.QUEUED, ResponseStatus.IN_PROGRESS)

    @property
    def complete(self) -> bool:
        """Whether it ended with `response.completed`."""
        return self.status in (ResponseStatus.COMPLETED, ResponseStatus.INCOMPLETE)

    def advance(self, event: ResponseEvent) -> None:
        """The one place where the status changes. Raises `KeyError` for an event that the status does not allow."""
        self.status = RESPONSE_TRANSITIONS[self.status, event]

    def object(self) -> dict[str, Any]:
        """The present response object."""
        request, sampling = self._request, self._sampling
        done = self.complete
        raw = request.enable_response_messages and done and self._choice is not None
        return {
            "id": self.id,
            "created_at": self._created,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status is ResponseStatus.INCOMPLETE else None,
            "instructions": request.instructions,
            "metadata": request.metadata,
            "model": self._model,
            "object": "response",
            "output": self.output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "temperature": sampling.temperature,
            "tool_choice": _plain(request.tool_choice),
            "tools": self._tools,
            "top_p": sampling.top_p,
            "background": bool(request.background),
            "max_output_tokens": sampling.max_tokens,
            "max_tool_calls": request.max_tool_calls,
            "previous_response_id": request.previous_response_id,
            "prompt": None,
            "reasoning": _plain(request.reasoning),
            "service_tier": request.service_tier,
            "status": self.status,
            "text": self._text_config(),
            "top_logprobs": sampling.logprobs,
            "truncation": request.truncation,
            "usage": self._usage() if done else None,
            "user": request.user,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": [self._raw(self._prompt)] if raw else None,
            "output_messages": [self._raw(self._choice.tokens)] if raw and self._choice is not None else None,
        }

    def begin(self) -> bytes:
        """The events before the first token."""
        self.events += [
            self._event("response.created", response=self.object()),
            self._event("response.in_progress", response=self.object()),
        ]
        return b"".join(self.events)

    def first(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def token(self, choice: Choice) -> bytes:
        """The events with the new text of a choice."""
        before = len(self.events)
        text, tokens = choice.take()
        logprobs = self._take_logprobs(choice, len(tokens))
        if text:
            if not self._open:
                self._open_item()
            self._text.append(text)
            self._add(
                "response.output_text.delta",
                content_index=0,
                delta=text,
                item_id=self._item_id,
                logprobs=[_without_bytes(one) for one in logprobs],
                output_index=0,
            )
        return b"".join(self.events[before:])

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The events after the last token."""
        before = len(self.events)
        if self._open:
            self._close_item()
        self._end(choices[0], self.output)
        self._add("response.completed", response=self.object())
        return b"".join(self.events[before:])

    def finish(self, choice: Choice, text: str) -> dict[str, Any]:
        """End a response that was not streamed. Returns its object."""
        self._take_logprobs(choice, len(choice.tokens))
        self._end(choice, [self._item([self._part(text)] if text else [], "completed")])
        return self.object()

    def _end(self, choice: Choice, output: list[dict[str, Any]]) -> None:
        self._choice = choice
        self.output = output
        length = choice.finish_reason == "length"
        self.advance(ResponseEvent.TOKENS_EXHAUSTED if length else ResponseEvent.COMPLETED)

    def _open_item(self) -> None:
        self._open = True
        self._add("response.output_item.added", item=self._item([], "in_progress"), output_index=0)
        part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        self._add("response.content_part.added", content_index=0, item_id=self._item_id, output_index=0, part=part)

    def _close_item(self) -> None:
        text, where = "".join(self._text), {"content_index": 0, "item_id": self._item_id}
        self._add("response.output_text.done", **where, logprobs=[], output_index=0, text=text)
        self._add("response.content_part.done", **where, output_index=0, part=self._part(text))
        item = self._item([self._part(text)], "completed")
        self.output = [item]
        self._add("response.output_item.done", item=item, output_index=0)

    def _item(self, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "content": content,
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def _part(self, text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": self._logprobs or None}

    def _take_logprobs(self, choice: Choice, tokens: int) -> list[dict[str, Any]]:
        if not self._request.wants_logprobs:
            return []
        entries = chat_logprobs(choice.logprobs(tokens), self._request.top_logprobs, self._texts)["content"]
        new = [_ordered(entry) for entry in entries]
        self._logprobs += new
        return new

    def _usage(self) -> dict[str, Any]:
        choice = self._choice
        output = 0 if choice is None else len(choice.tokens)
        return {
            "input_tokens": len(self._prompt),
            "input_tokens_details": {
                "cached_tokens": 0 if choice is None else choice.cached_tokens,
                "cache_write_tokens": 0 if choice is None else created_cache_tokens(choice, self._service.block_size),
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": output,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": len(self._prompt) + output,
        }

    def _text_config(self) -> dict[str, Any] | None:
        config = self._request.text
        if config is None:
            return None
        form = None if config.format is None else config.format.model_dump(by_alias=True)
        return {"format": form, "verbosity": config.verbosity}

    def _raw(self, tokens: Sequence[int]) -> dict[str, Any]:
        text = self._service.tokenizer.decode(tokens, skip_special_tokens=False)
        return {"message": text, "tokens": tokens, "type": "raw_message_tokens"}

    def _add(self, kind: str, **fields: Any) -> None:
        self.events.append(self._event(kind, **fields))

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One event, numbered by the events before it: events that are made together must be added together."""
        number = len(self.events) + (kind == "response.in_progress")
        text = {"text": fields.pop("text")} if "text" in fields else {}  # the only field after the number
        data = orjson.dumps({**fields, "sequence_number": number, **text, "type": kind})
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _ordered(entry: dict[str, Any]) -> dict[str, Any]:
    """A log probability in the order of the Responses API."""
    top = [_ordered(one) for one in entry.get("top_logprobs", ())]
    shown = {"token": entry["token"], "bytes": entry["bytes"], "logprob": entry["logprob"]}
    return shown | {"top_logprobs": top} if "top_logprobs" in entry else shown


def _without_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """A log probability as streams have it."""
    top = [{"token": one["token"], "logprob": one["logprob"]} for one in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}
