"""A stream that goes on at another worker when its own fails. Sans-IO: events in, events out.

The engine is asked for the ids of the tokens it generates (`return_token_ids`). When its stream breaks off, another
engine gets the prompt's ids and those of the answer so far as the prompt of a completion, and what it generates is
written into the client's stream. Compared with vLLM 0.32 at temperature 0: from every token on, the continuation has
the ids and the text of the undisturbed answer, for completions and for chats alike.

A chat that offers tools goes on as a chat, in which the answer so far is the last message: only then does the engine
find calls of tools in the rest. That is done only if it gives the same token ids.

A prompt must not end within a character: vLLM's detokenizer would then repeat the whole prompt. So the tokens of an
unfinished character, of which the client has seen nothing, are generated again.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson

from kvcache.errors import SSE_DONE
from kvcache.keys import pack_tokens
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError
from router.core.decision import RouteRequest
from router.core.retries import FailureCause
from router.server.answer import EventKind, error_kind, event_fields
from router.server.prompts import CHAT, COMPLETIONS
from router.server.resumable import StreamRequest, asking_for_ids, stream_request
from router.server.stops import SeamStops
from router.upstream.interface import UpstreamRequest
from runtime.http.context import Headers
from runtime.sse import EMPTY_LINE, event_data

_TAIL = 128
"""Characters of the text so far that are kept, to find out which tokens they are the text of."""
_WINDOW = 16
"""Tokens before a boundary that are compared with the text, besides those of text that the engine held back."""
_UNFINISHED = 8
"""Tokens that an unfinished character, or several that follow one another, may have."""


class Decode(Protocol):
    """The text of token ids. Raises `TokenizerError`."""

    def __call__(self, ids: Sequence[int], /, *, skip_special_tokens: bool) -> str: ...


Read = Callable[[str, bytes], Awaitable[RouteRequest]]
"""What a decision needs of a request, by its path and body; without keys if its prompt cannot be read."""


class Resumption:
    """One stream with a single choice, over all of its attempts. Memory: 4 bytes for each token of prompt and answer.

    `decode`: the tokenizer's. `read`: reads the prompt of a request. `longest`: the most tokens of prompt and answer,
    None if it is not known.
    """

    MAX_HELD = 8 << 20
    """Bytes of one event: the first holds the ids of the whole prompt."""

    def __init__(
        self, request: StreamRequest, headers: Headers, decode: Decode, read: Read, longest: int | None
    ) -> None:
        self._request = request
        self._read = read
        self._headers = headers
        self._decode = decode
        self._longest = longest
        self.cause: FailureCause | None = None
        """Why the stream goes on elsewhere; None: it has not been resumed."""
        self.failure: FailureCause | None = None
        """What the last event says about the worker; None: it works."""
        self._restart()

    def begin(self) -> None:
        """A worker gets the request, or the request for its rest."""
        self.failure = None
        if self.cause is None:
            self._restart()

    def _restart(self) -> None:
        """The request is sent from its beginning: nothing has gone to the client."""
        self.ended = False
        """The stream's last event has passed, whatever else the worker sends."""
        self._able = True
        self._in_text = not self._request.chat
        """The last content was text, not reasoning."""
        self._prompt = array("I")
        self._ids = array("I")
        self._tail = ""
        self._content: list[str] = []
        """The text so far, where the rest is asked for as a chat."""
        self._finished = self._counted = False
        self._stops: SeamStops | None = None
        """What watches the seam of the last two attempts for stop strings."""
        self._done_before = 0
        """Tokens that earlier attempts have generated."""
        self._held = ""
        """The text of the last tokens that the engine has not shown: a stop string may begin in it."""
        self._names: dict[str, Any] = {}
        """The fields that all events of the stream share."""

    # --- events ---

    def push(self, events: bytes) -> bytes:
        """Whole events of a worker. Returns what the client gets for them; sets `failure` if one says that the worker
        fails, and drops that and what follows."""
        shown: list[bytes] = []
        for event in EMPTY_LINE.split(events):
            if event and (seen := self._event(event)):
                shown += (seen, b"\n\n")
            if self.failure is not None:
                break
            if self.stopped:
                shown.append(self.closing() or b"")
                self.ended = True
                break
        return b"".join(shown)

    @property
    def stopped(self) -> bool:
        """Whether the text ends at a stop string across a seam, so that the worker's further events do not matter."""
        return self._stops is not None and self._stops.stopped_by is not None

    def _event(self, event: bytes) -> bytes:
        data = event_data(event).strip()
        if data == b"[DONE]":
            self.ended = True
        fields = event_fields(data) if data else None
        if fields is None:
            self._able = self._able and data in (b"", b"[DONE]")
            return event
        choices = fields.get("choices") or []
        if error_kind(fields) is EventKind.FAILURE and self._able:
            self.failure = FailureCause.ERROR_EVENT
            return b""
        if not _is_chunk(fields):
            self._able = False
            return event
        if choices and self._able and choices[0].get("finish_reason") == "abort":
            self.failure = FailureCause.ABORTED
            return b""
        shown = self._first(fields, choices) if self.cause is None else self._further(fields, choices)
        return b"" if shown is None else b"data: " + orjson.dumps(shown)

    def _first(self, fields: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any] | None:
        """An event of the first attempt: it loses what the client has not asked for."""
        if not self._names:
            self._names = {name: fields[name] for name in ("id", "object", "created", "model") if name in fields}
        self._counted = self._counted or not choices
        asked = self._request.shows_ids
        prompt = fields.get("prompt_token_ids")
        if not asked and prompt is not None:
            fields["prompt_token_ids"] = None
        for choice in choices:
            prompt = prompt or choice.get("prompt_token_ids")
            delta = choice.get("delta")
            text = choice.get("text") if delta is None else delta.get("content")
            self._note(choice, text or "")
            if delta is not None:
                self._note_delta(delta)
            if not asked:
                for name in ("token_ids", "prompt_token_ids"):
                    if name in choice:
                        choice[name] = None
                if delta is not None and choice.get("finish_reason") is None and not any(delta.values()):
                    return None  # without token ids vLLM sends no event for a token that shows nothing
        if prompt and not self._prompt:
            self._prompt.extend(prompt)
        return fields

    def _note(self, choice: Mapping[str, Any], text: str) -> None:
        ids = choice.get("token_ids") or ()
        if text and not ids:
            self._able = False
        self._ids.extend(ids)
        self._tail = (self._tail + text)[-_TAIL:]
        if text and self._request.offered_tools is not None:
            self._content.append(text)
        self._finished = self._finished or choice.get("finish_reason") is not None

    def _note_delta(self, delta: Mapping[str, Any]) -> None:
        if delta.get("tool_calls") or delta.get("function_call"):
            self._able = False
        if delta.get("reasoning") or delta.get("reasoning_content"):
            self._in_text = False
            self._tail = ""
        elif delta.get("content"):
            self._in_text = True

    def _further(self, fields: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any] | None:
        """An event of a later attempt as one of the stream that the client has been reading."""
        of_chat = self._request.offered_tools is not None
        parts = [self._part(choice) if of_chat else self._choice(choice) for choice in choices]
        if None in parts:
            return None
        shown = {**self._names, "choices": parts}
        self._counted = self._counted or not choices
        usage = fields.get("usage")
        if isinstance(usage, dict):
            count = usage.get("completion_tokens")
            shown["usage"] = self._usage(count if type(count) is int else 0)
        elif "usage" in fields:
            shown["usage"] = None
        if "system_fingerprint" in fields:
            shown["system_fingerprint"] = fields["system_fingerprint"]
        return shown

    def _part(self, choice: Mapping[str, Any]) -> dict[str, Any] | None:
        """A choice of a chat's event; None for the one that states the role, which the client knows."""
        delta = {name: value for name, value in (choice.get("delta") or {}).items() if name != "role"}
        self._note(choice, delta.get("content") or "")
        self._note_delta(delta)
        if choice.get("finish_reason") is None and not any(delta.values()):
            return None
        return {**choice, "delta": delta, "token_ids": choice.get("token_ids") if self._request.shows_ids else None}

    def _choice(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of a completion's event."""
        text, finish, stop = choice.get("text") or "", choice.get("finish_reason"), choice.get("stop_reason")
        if self._stops is not None:
            text = self._stops.push(text, last=finish is not None)
            if self.stopped:
                choice = {**choice, "text": text, "finish_reason": "stop", "stop_reason": self._stops.stopped_by}
                finish, stop = "stop", self._stops.stopped_by
        self._note({**choice, "finish_reason": finish}, text)
        ids = choice.get("token_ids") if self._request.shows_ids else None
        if not self._request.chat:
            return {**choice, "text": text, "prompt_token_ids": None, "token_ids": ids}
        shown = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
        if finish is not None:
            shown["stop_reason"] = stop
        return {**shown, "token_ids": ids}

    def _usage(self, completion: int) -> dict[str, Any]:
        """The usage of the whole stream. How much of the prompt was cached only the first worker could have told."""
        prompt, completion = len(self._prompt), self._done_before + completion
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": None,
        }

    def closing(self) -> bytes | None:
        """The events that are missing of a stream whose text is complete; None if its text is not."""
        if self.ended:
            return b""
        if not self._finished:
            return None
        if self._counted or not self._request.counts:
            return SSE_DONE
        usage = {**self._names, "choices": [], "usage": self._usage(len(self._ids) - self._done_before)}
        return b"data: " + orjson.dumps(usage) + b"\n\n" + SSE_DONE

    # --- going on ---

    async def go_on(self, cause: FailureCause) -> bool:
        """The worker failed in the middle of the stream. Returns whether it can go on at another one."""
        self.failure = None
        if not (self._able and self._in_text and self._prompt) or self._finished:
            return False
        if self._stops is not None and self._stops.watching:
            return False  # two engines hold text back
        kept = self._boundary()
        if kept is None or (self._request.shows_ids and kept < len(self._ids)):
            return False
        del self._ids[kept:]
        left = self._left()
        if left is None or left < 1:
            return False
        if self._request.offered_tools is not None:
            read = await self._read(CHAT, self.request().body)
            if read.keys is None or read.keys.packed != pack_tokens(self._prompt + self._ids):
                return False
        self._stops = SeamStops(self._held, self._request.stops) if self._held else None
        self._done_before = kept
        self.cause = cause
        return True

    def _boundary(self) -> int | None:
        """How many of the generated tokens the text so far is the text of: all but those of an unfinished character.
        None if their text is another one, because the engine changed it or has another tokenizer."""
        ids, decode, request = self._ids, self._decode, self._request
        self._held = ""
        if not self._tail:
            return 0  # the client has seen no text
        back = max(map(len, request.stops), default=1) - 1
        for kept in range(len(ids), max(len(ids) - _UNFINISHED, 0), -1):
            try:
                text = decode(ids[max(kept - _WINDOW - back, 0) : kept], skip_special_tokens=request.skips_special)
            except TokenizerError:
                return None
            if text.endswith("\ufffd"):
                continue
            text = text.lstrip("\ufffd")  # the window may begin within a character
            text, self._held = text[: len(text) - back], text[len(text) - back :]
            same = self._tail.endswith(text) or text.endswith(self._tail)
            return kept if text and same else None
        return None

    def _left(self) -> int | None:
        """How many tokens may still be generated; None: it is not known."""
        done, longest = len(self._ids), self._longest
        room = longest - len(self._prompt) - done if longest is not None else None
        if self._request.max_tokens is None:
            return room
        left = self._request.max_tokens - done
        return left if room is None else min(left, room)

    def request(self) -> UpstreamRequest:
        """The request for the rest of the stream."""
        path, fields = COMPLETIONS, {**self._request.sampling}
        offered = self._request.offered_tools
        if offered is None:
            fields |= {"prompt": [*self._prompt, *self._ids], "stream": True}
        else:
            answer = {"role": "assistant", "content": "".join(self._content)}
            going_on = {"add_generation_prompt": False, "continue_final_message": True, "max_completion_tokens": None}
            path, fields = CHAT, {**offered, "messages": [*offered["messages"], answer], **going_on}
        fields |= {
            "max_tokens": self._left(),
            "min_tokens": max(self._request.min_tokens - len(self._ids), 0),
            "return_token_ids": True,
        }
        return UpstreamRequest("POST", path, self._headers, orjson.dumps(fields), repeatable=True)

    def route(self, route: RouteRequest) -> RouteRequest:
        """What a decision about that request needs; `route` is that of the whole request."""
        tokens = self._prompt + self._ids
        keys = route.keys.of(pack_tokens(tokens)) if route.keys is not None else None
        return replace(route, keys=keys, prompt_tokens=len(tokens), output_tokens=self._left(), reported=None)


def _is_chunk(fields: Mapping[str, Any]) -> bool:
    """Whether an event is one of vLLM's: at most one choice, whose fields have the types that are read here."""
    choices = fields.get("choices")
    if not isinstance(choices, list) or len(choices) > 1 or not _is_ids(fields.get("prompt_token_ids")):
        return False
    for choice in choices:
        if not isinstance(choice, dict):
            return False
        delta = choice.get("delta")
        if not isinstance(delta, dict | None):
            return False
        texts = (choice.get("text"), delta.get("content") if delta is not None else None)
        if not all(isinstance(text, str | None) for text in texts):
            return False
        if not (_is_ids(choice.get("token_ids")) and _is_ids(choice.get("prompt_token_ids"))):
            return False
    return True


def _is_ids(ids: object) -> bool:
    if ids is None:
        return True
    try:
        array("I", ids if isinstance(ids, list) else (None,))
    except (TypeError, OverflowError):
        return False
    return True


@dataclass(slots=True)
class Resumptions:
    """Makes the `Resumption` of each stream that may go on elsewhere.

    `known(model)` is asked when a stream begins: for the model's tokenizer, and for the most tokens of prompt and
    answer. `read`: see `Resumption`.
    """

    known: Callable[[str | None], tuple[Tokenizer | None, int | None]]
    read: Read

    def of(self, request: UpstreamRequest, route: RouteRequest) -> Resumption | None:
        """How the request's stream goes on if its worker fails. None if it cannot. The request is made to ask for what
        that takes."""
        if not route.streaming or request.method != "POST" or route.stored is not None:
            return None
        path = request.target.partition("?")[0]
        if path not in (COMPLETIONS, CHAT):
            return None
        tokenizer, longest = self.known(route.model)
        if tokenizer is None:
            return None
        stated = stream_request(path, request.body)
        if stated is None or (stated.max_tokens is None and longest is None):
            return None
        request.body = asking_for_ids(request.body)
        return Resumption(stated, request.headers, tokenizer.decode, self.read, longest)
