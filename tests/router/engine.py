"""An engine that answers one prompt token for token and fails as it is told, for tests of streams that go on.

Checked against vLLM 0.32: `return_token_ids`, the events of a stream, how it ends when the engine fails or is stopped
(docs/router.md). Not modelled: usage of tokens other than those of the one answer; other prompts are refused.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from kvcache.prompts import chat_request_prompt
from kvcache.tokens.tokenizer import Tokenizer
from tests.router.conftest import RunningRouter
from tests.router.fakes import DONE, ERROR_EVENT, Connection, Received, Script

PROMPT = "One two three"
ANSWER = " four five six seven eight nine ten eleven"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def sse(fields: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


def prompts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The prompt of each API, in token ids."""
    return {
        COMPLETIONS: tokenizer.encode(PROMPT),
        CHAT: chat_request_prompt({"messages": [{"role": "user", "content": PROMPT}]}, tokenizer),
    }


class Reader:
    """Is told when the client has read something: what fails then fails in the middle of its stream."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()


class Engine(Reader):
    """A worker that answers as vLLM does, one token an event, and fails after `after` of them in the way of `fail`."""

    def __init__(
        self, tokenizer: Tokenizer, answer: str = ANSWER, after: int = 1000, fail: Script | None = None, of: int = 1
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tokens = tokenizer.encode(answer)
        self.after = after
        self.fail = fail
        self.of = of
        """Tokens of one event."""

    async def __call__(self, connection: Connection, request: Received) -> None:
        body = orjson.loads(request.body)
        chat = request.target == CHAT
        asked = body.get("prompt")
        if chat:
            prompt = chat_request_prompt(body, self.tokenizer)
            begun = body["messages"][-1]["content"] if body.get("continue_final_message") else ""
            done = len(self.tokenizer.encode(begun))
        else:
            prompt = asked if isinstance(asked, list) else self.tokenizer.encode(PROMPT)
            known = prompts(self.tokenizer).values()
            done = next(len(prompt) - len(one) for one in known if prompt[: len(one)] == one)
        tokens = self.tokens[done : done + body.get("max_tokens", 16)]
        with_ids = body.get("return_token_ids")
        name = f"x-{id(self)}"
        head = {"id": name, "object": "chat.completion.chunk" if chat else "text_completion", "created": id(self)}
        await connection.begin_stream()
        if chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            await connection.chunk(sse({**head, "choices": [role], "prompt_token_ids": prompt if with_ids else None}))
        shown = 0
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        window = max(map(len, stops), default=1) - 1
        whole, sent = "", 0
        for at in range(0, len(tokens), self.of):
            if at >= self.after and self.fail is not None:
                await self.reads.wait()
                await self.fail(connection, request)
                return
            some = tokens[at : at + self.of]
            text = ""
            for end in range(at + 1, at + 1 + len(some)):
                delta = self.tokenizer.decode(tokens[shown:end])
                if not delta.endswith("\ufffd"):  # vLLM shows no token of an unfinished character
                    text, shown = text + delta, end
            whole += text
            at_stop = min((at for at in map(whole.find, stops) if at >= 0), default=None)
            upto = max(len(whole) - window, sent) if at_stop is None and at + self.of < len(tokens) else at_stop
            text, sent = whole[sent:upto], max(sent, len(whole) if upto is None else upto)
            last = at + self.of >= len(tokens) or at_stop is not None
            choice: dict[str, Any] = {"index": 0, "delta": {"content": text}} if chat else {"index": 0, "text": text}
            choice |= {"logprobs": None, "finish_reason": ("length" if at_stop is None else "stop") if last else None}
            if not chat:
                choice["prompt_token_ids"] = prompt if with_ids and at == 0 else None
            choice["token_ids"] = some if with_ids else None
            await connection.chunk(sse({**head, "choices": [choice]}))
            if last:
                break
        if (body.get("stream_options") or {}).get("include_usage"):
            counts = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens), "prompt_tokens_details": None}
            await connection.chunk(sse({**head, "choices": [], "usage": counts}))
        await connection.chunk(DONE)
        await connection.end_stream()


async def resets(connection: Connection, request: Received) -> None:
    connection.reset()


async def closes_early(connection: Connection, request: Received) -> None:
    await connection.end_stream()


async def says_error(connection: Connection, request: Received) -> None:
    await connection.chunk(ERROR_EVENT + DONE)
    await connection.end_stream()


async def aborts(connection: Connection, request: Received) -> None:
    if request.target == CHAT:
        choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "abort", "token_ids": []}
    else:
        choice = {"index": 0, "text": "", "finish_reason": "abort", "token_ids": []}
    await connection.chunk(sse({"id": "x", "choices": [choice]}) + DONE)
    await connection.end_stream()


TOOL = {"type": "function", "function": {"name": "f"}}
FAILURES = {"broken": resets, "early end": closes_early, "error event": says_error, "abort": aborts}


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": PROMPT}]}
    return {"max_tokens": 8, "stream": True, **asked, **fields}


class Seen:
    """What a client saw of a stream."""

    def __init__(self, raw: bytes) -> None:
        data = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event.startswith(b"data: ")]
        self.done = data[-1] == b"[DONE]"
        events = [orjson.loads(one) for one in data if one != b"[DONE]"]
        self.errors = [event for event in events if "error" in event]
        self.events = [event for event in events if "error" not in event]
        choices = [choice for event in self.events for choice in event["choices"]]
        self.text = "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
        self.roles = sum("role" in choice.get("delta", {}) for choice in choices)
        self.finished = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        self.names = {(event["id"], event["object"], event["created"]) for event in self.events}
        self.usage = next((event["usage"] for event in self.events if event.get("usage")), None)
        self.ids = [token for choice in choices for token in choice.get("token_ids") or ()]


async def stream(router: RunningRouter, path: str, *told: Reader, **fields: Any) -> Seen:
    raw = b""
    async with router.client.stream("POST", path, json=body_of(path, **fields)) as answer:
        async for piece in answer.aiter_raw():
            raw += piece
            for one in told:
                one.reads.set()
    return Seen(raw)
