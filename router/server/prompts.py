"""From a request's body to what a decision needs: its block keys, its length, whether it streams."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from kvcache.keys import PrefixKeys, TokenIdError, pack_tokens
from kvcache.prompts import PromptError, chat_request_prompt, completion_request_prompts, request_scope
from kvcache.tokens.tokenizer import Tokenizer, TooManyTokensError
from router.core.decision import RouteRequest, Unread
from router.server.prompt_queue import PATIENCE, Checkpoint, PromptQueue
from router.server.reported import reads_no_cache, reported_sequence

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

PROMPTLESS = RouteRequest(keys=None, prompt_tokens=None, streaming=False, prompted=False)
"""A request without a prompt."""

INLINE_TEXT = 16_384
"""Text longer than this (bytes of the body) is tokenised in a thread: 8 ms at 2 MB/s would hold up all others."""
INLINE_BODY = 131_072
"""A body longer than this (bytes) is parsed in a thread: so many bytes of token ids take 1 ms."""
LONG_DEPTH = 2048
"""A prompt of more blocks than this has its keys computed in the thread: 2 ms on the event loop otherwise."""

BYTES_PER_TOKEN = 16
"""A body of more bytes than this for each token that the longest context takes is not read: text has 3 to 5 a token,
escaped as `\\uXXXX` up to 12."""
UNKNOWN_CONTEXT = 262_144
"""Tokens of the longest context, as long as no worker has said."""
BESIDES = 65_536
"""Bytes of a body beside its prompt: tools, schemas."""

_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.){0,512}")')
_STREAM = re.compile(rb'"stream"\s*:\s*true\b')
_ENDS = 65_536
_HUGE = re.compile(rb"\d{19}")
_EXACT = frozenset({"tools", "chat_template_kwargs"})
"""Fields whose numbers a chat template may write out."""


class PromptReader:
    """Reads prompts as the workers do. What it cannot read it leaves to the worker, whose error the client gets.

    `longest` gives the most tokens that any worker takes in one request, None while that is not known. Without a
    `tokenizer` (it is still being loaded, or cannot be) no prompt is read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        block_size: int,
        longest: Callable[[], int | None] = lambda: None,
        patience: float = PATIENCE,
    ) -> None:
        self.tokenizer = tokenizer
        self._block_size = block_size
        self._longest = longest
        self._queue = PromptQueue(patience)

    def close(self) -> None:
        self._queue.close()

    async def read(self, path: str, body: bytes) -> RouteRequest:
        """What the router knows about a request; `keys` is None when its prompt was not read, `unread` says why."""
        size, longest = len(body), self._longest()
        if size > (longest or UNKNOWN_CONTEXT) * BYTES_PER_TOKEN + BESIDES:
            return _glance(body, Unread.TOO_LONG)
        if size <= INLINE_BODY:
            fields = _parse(body)
            if fields is None:
                return _no_request()
            if size <= INLINE_TEXT or _is_token_ids(fields.get("prompt")):
                return self._route(path, fields, longest)
        try:
            return await self._queue.run(size, lambda checkpoint: self._read(path, body, longest, checkpoint))
        except TimeoutError:
            return _glance(body, Unread.BUSY)

    def _read(self, path: str, body: bytes, longest: int | None, checkpoint: Checkpoint) -> RouteRequest:
        fields = _parse(body)
        if fields is None:
            return _no_request()
        route = self._route(path, fields, longest, checkpoint)
        if route.keys is not None and route.keys.depth > LONG_DEPTH:
            route.keys.compute(checkpoint)
        return route

    def _route(
        self, path: str, fields: Mapping[str, Any], longest: int | None, checkpoint: Checkpoint | None = None
    ) -> RouteRequest:
        if self.tokenizer is None:
            return _unread(Unread.NO_TOKENIZER, fields)
        # Where `truncate_prompt_tokens` cuts a prompt down, it may be longer than what a worker takes.
        limit = longest if fields.get("truncate_prompt_tokens") is None else None
        tokenizer = self.tokenizer.bounded(limit, checkpoint or Checkpoint())
        streaming = fields.get("stream") is True
        try:
            if path == CHAT:
                prompts = [chat_request_prompt(fields, tokenizer, longest)]
            else:
                prompts = completion_request_prompts(fields, tokenizer, longest)
            scope = request_scope(fields)
            # Several prompts in one request go to one worker; the first stands for where they are cached.
            keys = PrefixKeys(pack_tokens(prompts[0]), self._block_size, scope)
            reported = reported_sequence(fields, prompts, keys, self._block_size, scope, streaming=streaming)
        except (PromptError, TokenIdError):
            return _unread(Unread.UNREADABLE, fields)
        except TooManyTokensError:
            return _unread(Unread.TOO_LONG, fields)
        if limit is not None and max(map(len, prompts)) > limit:
            return _unread(Unread.TOO_LONG, fields)
        reads = not reads_no_cache(fields, chat=path == CHAT)
        return RouteRequest(
            keys=keys if reads else None,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            streaming=streaming,
            model=_model(fields),
            output_tokens=_output_tokens(fields),
            reported=reported if reads else None,
        )


def _no_request() -> RouteRequest:
    """The body is no JSON object."""
    return replace(PROMPTLESS, unread=Unread.UNREADABLE)


def _unread(why: Unread, fields: Mapping[str, Any]) -> RouteRequest:
    return RouteRequest(
        keys=None,
        prompt_tokens=None,
        streaming=fields.get("stream") is True,
        model=_model(fields),
        output_tokens=_output_tokens(fields),
        unread=why,
    )


def _glance(body: bytes, why: Unread) -> RouteRequest:
    """Of a body that is not parsed: the model and whether it streams, where its first or last bytes show it."""
    model, streaming = None, False
    for part in (body[:_ENDS], body[-_ENDS:]):
        if found := _MODEL.search(part):
            model = _name(found[1])
        streaming = streaming or _STREAM.search(part) is not None
    return RouteRequest(keys=None, prompt_tokens=None, streaming=streaming, model=model, unread=why)


def _name(quoted: bytes) -> str | None:
    try:
        name = orjson.loads(quoted)
    except orjson.JSONDecodeError:
        return None
    return name if isinstance(name, str) else None


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        try:
            fields = orjson.loads(body)
            exact = isinstance(fields, dict) and bool(_EXACT & fields.keys()) and _HUGE.search(body) is not None
        except orjson.JSONDecodeError:
            exact = True
        if exact:
            # What vLLM's server reads with: whole numbers of more than 64 bits are not rounded, and it takes NaN, lone
            # surrogates, a byte order mark, UTF-16 and UTF-32.
            fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _model(fields: Mapping[str, Any]) -> str | None:
    model = fields.get("model")
    return model if isinstance(model, str) else None


def _output_tokens(fields: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _is_token_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
