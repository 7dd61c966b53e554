"""From a request's body to what a decision needs: its block keys, its length, whether it streams."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from kvcache.keys import PrefixKeys, TokenIdError, pack_tokens
from kvcache.prompts import PromptError, chat_request_prompt, completion_request_prompts, request_scope
from kvcache.tokenizer import Tokenizer
from router.core.decision import RouteRequest
from router.server.reported import reads_no_cache, reported_sequence

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

UNREAD = RouteRequest(keys=None, prompt_tokens=None, streaming=False, prompted=False)
"""What is known of a request without a prompt, or whose body is no request."""

THREAD_TEXT = 16_384
"""Text longer than this (characters) is tokenised in a thread: 8 ms at 2 MB/s would hold up every other request."""
THREAD_BODY = 1 << 20
"""A body larger than this (bytes) is parsed in a thread."""


class PromptReader:
    """Reads prompts as the workers do. What it cannot read it leaves to the worker, whose error the client gets."""

    def __init__(self, tokenizer: Tokenizer, block_size: int) -> None:
        self._tokenizer = tokenizer
        self._block_size = block_size
        # One thread: tokenising holds no lock while it works, so more would only take CPU from the event loop.
        self._thread = ThreadPoolExecutor(1, "tokenise")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def read(self, path: str, body: bytes) -> RouteRequest:
        """What the router knows about a request; `keys` is None when its prompt cannot be read."""
        loop = asyncio.get_running_loop()
        if len(body) > THREAD_BODY:
            return await loop.run_in_executor(self._thread, self._read, path, body)
        fields = _parse(body)
        if fields is None:
            return UNREAD
        if len(body) > THREAD_TEXT and not _is_token_ids(fields.get("prompt")):
            return await loop.run_in_executor(self._thread, self._route, path, fields)
        return self._route(path, fields)

    def _read(self, path: str, body: bytes) -> RouteRequest:
        fields = _parse(body)
        if fields is None:
            return UNREAD
        return self._route(path, fields)

    def _route(self, path: str, fields: Mapping[str, Any]) -> RouteRequest:
        model = fields.get("model")
        model = model if isinstance(model, str) else None
        streaming = fields.get("stream") is True
        output_tokens = _output_tokens(fields)
        try:
            if path == CHAT:
                prompts = [chat_request_prompt(fields, self._tokenizer)]
            else:
                prompts = completion_request_prompts(fields, self._tokenizer)
            scope = request_scope(fields)
            # Several prompts in one request go to one worker; the first stands for where they are cached.
            keys = PrefixKeys(pack_tokens(prompts[0]), self._block_size, scope)
            reported = reported_sequence(fields, prompts, keys, self._block_size, scope, streaming=streaming)
        except (PromptError, TokenIdError):
            return RouteRequest(
                keys=None, prompt_tokens=None, streaming=streaming, model=model, output_tokens=output_tokens
            )
        reads = not reads_no_cache(fields, chat=path == CHAT)
        return RouteRequest(
            keys=keys if reads else None,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            streaming=streaming,
            model=model,
            output_tokens=output_tokens,
            reported=reported if reads else None,
        )


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


def _output_tokens(fields: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _is_token_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
