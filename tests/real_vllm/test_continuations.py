"""Streams that are cut after any event and go on from their token ids have the text of an undisturbed stream.

The router's own `Resumption` reads the events and asks for the rest, of the same engine, at temperature 0. Also that a
response gets the id that its request states. Not covered: what happens between two workers
(tests/router/test_resumption.py), responses that are stored, which takes an engine that stores them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from kvcache.tokens.tokenizer import Tokenizer
from router.core.retries import FailureCause
from router.server.prompts import CHAT, COMPLETIONS, PromptReader
from router.server.resumable import asking_for_ids, stream_request
from router.server.resumption import Resumption
from tests.real_vllm.conftest import VLLM
from tests.real_vllm.served import Emulated, Running, Served

TOKENS = 16
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
WORDS = [1440, 1936, 2237, 3598]
"""The words four, five, six and seven, each with a space, in GPT-2's vocabulary. What a model of random weights writes
freely is text for which a tokenizer gives other tokens, so that a chat with it is another one, and does not go on."""

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {"prompt": "The quick brown fox jumps over"}),
    "token ids": (COMPLETIONS, {"prompt": [464, 2068, 7586, 21831]}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "Tell me a story."}]}),
    "stop strings": (CHAT, {"messages": [{"role": "user", "content": "Stop."}], "stop": ["qqqqqqqq", "zzzz"]}),
    "chat that offers tools": (
        CHAT,
        {"messages": [{"role": "user", "content": "Look it up."}], "tools": [TOOL], "allowed_token_ids": WORDS},
    ),
}


@pytest.fixture(params=["emulated", *VLLM])
async def served(
    request: pytest.FixtureRequest, tmp_path: Path, emulator_tokenizer: Tokenizer
) -> AsyncIterator[Served]:
    """An engine that takes its time, so that not all tokens share an event."""
    emulated = request.param == "emulated"
    one = Emulated(tmp_path, emulator_tokenizer, "--speed", "4") if emulated else Running()
    await one.start()
    yield one
    await one.close()


async def events(client: httpx.AsyncClient, path: str, body: bytes) -> list[bytes]:
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    return [event + b"\n\n" for event in answer.content.split(b"\n\n") if event]


def shown(raw: bytes) -> tuple[str, list[str], Any]:
    """Text, finish reasons and usage of a stream."""
    data = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    assert data.pop() == b"[DONE]"
    fields = [orjson.loads(one) for one in data]
    choices = [choice for event in fields for choice in event["choices"]]
    text = "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)
    usage = next((event["usage"] | {"prompt_tokens_details": None} for event in fields if event.get("usage")), None)
    return text, [choice["finish_reason"] for choice in choices if choice["finish_reason"]], usage


@pytest.mark.process
@pytest.mark.parametrize("kind", list(REQUESTS))
async def test_a_stream_that_is_cut_anywhere_goes_on_as_if_nothing_had_happened(served: Served, kind: str) -> None:
    path, asked = REQUESTS[kind]
    fields = {"model": served.model, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    body = orjson.dumps({**fields, "stream_options": {"include_usage": True}, **asked})
    request = stream_request(path, body)
    assert request is not None
    reader = PromptReader(served.tokenizer, 16)
    went_on = possible = 0
    async with httpx.AsyncClient(base_url=served.url, timeout=60, trust_env=False) as client:
        undisturbed = shown(b"".join(await events(client, path, body)))
        told = await events(client, path, asking_for_ids(body))
        for cut in range(1, len(told)):
            stream = Resumption(request, [], served.tokenizer.decode, reader.read, served.max_model_len)
            stream.begin()
            before = stream.push(b"".join(told[:cut]))
            text, finished, _ = shown(before + b"data: [DONE]\n\n")
            possible += bool(text) and not finished
            if await stream.go_on(FailureCause.BROKEN):
                went_on += 1
                stream.begin()
                rest = stream.request()
                after = stream.push(b"".join(await events(client, rest.target, rest.body)))
                assert shown(before + after) == undisturbed, cut
    reader.close()
    print(f"{kind}: {went_on} of {possible} cut streams went on")  # noqa: T201
    assert went_on == possible > 0


async def test_a_response_has_the_id_that_its_request_states(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60, trust_env=False) as client:
        for stated in ('"request_id":"resp_a",', '"request_id":"resp_first","request_id":"resp_a",'):
            body = f'{{{stated}"model":"{served.model}","input":"hi","max_output_tokens":2}}'
            headers = {"content-type": "application/json", "x-request-id": "another"}
            answer = await client.post("/v1/responses", content=body, headers=headers)
            assert answer.json()["id"] == "resp_a"
