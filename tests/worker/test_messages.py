"""/v1/messages: Anthropic's API.

Not covered: the bounds of its fields (`pairs`), thinking and tool calls, which the emulator never generates.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

MESSAGES = "/v1/messages"
HI = {"model": "tiny-llama", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}


def events(reply: Any) -> list[tuple[str, dict[str, Any]]]:
    lines = [event.partition("\n") for event in reply.text.removesuffix("\n\n").split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, _, data in lines]


@pytest.mark.looptime
async def test_a_stream_opens_one_block_and_states_why_it_ended(start) -> None:
    told = events(await start(mean_output_tokens=100_000).client.post(MESSAGES, HI | {"stream": True}))
    assert [name for name, _ in told] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert told[0][1]["message"]["usage"]["output_tokens"] == 0
    assert told[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert told[-2][1]["usage"]["output_tokens"] == 3


async def test_cached_tokens_are_no_input_tokens(start) -> None:
    client = start(speed=1000).client
    body = HI | {"messages": [{"role": "user", "content": "word " * 40}]}
    first, second = [(await client.post(MESSAGES, body)).json()["usage"] for _ in range(2)]
    whole = sum(value for name, value in first.items() if name != "output_tokens")
    assert sum(value for name, value in second.items() if name != "output_tokens") == whole
    assert (first["cache_read_input_tokens"], second["cache_creation_input_tokens"]) == (0, 0)
    assert first["cache_creation_input_tokens"] == second["cache_read_input_tokens"] == whole // 16 * 16
    counted = await client.post(f"{MESSAGES}/count_tokens", {"model": "tiny-llama", "messages": body["messages"]})
    assert counted.json() == {"input_tokens": whole, "context_management": {"original_input_tokens": whole}}


async def test_a_stop_sequence_is_named(start) -> None:
    client = start(speed=1000, mean_output_tokens=100_000).client
    text = (await client.post(MESSAGES, HI | {"max_tokens": 20})).json()["content"][0]["text"]
    word = text.split()[3]
    stopped = (await client.post(MESSAGES, HI | {"max_tokens": 20, "stop_sequences": [word]})).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", word)


async def test_errors_before_and_after_reading_have_two_shapes(start) -> None:
    client = start().client
    unread = await client.post(MESSAGES, HI | {"max_tokens": 0})
    assert "max_tokens must be positive" in unread.json()["error"]["message"]
    read = await client.post(MESSAGES, HI | {"model": "nope"})
    assert read.status == 404
    assert read.json()["type"] == "error"
    assert read.json()["error"]["type"] == "NotFoundError"


REFERENCE = {"type": "tool_reference", "name": "f"}


@pytest.mark.parametrize(
    ("system", "turns", "same"),
    [
        pytest.param("s", [("user", "a")], [("system", "s"), ("user", "a")], id="system"),
        pytest.param(
            [{"type": "text", "text": "s"}], [("user", "a")], [("system", "s"), ("user", "a")], id="system in parts"
        ),
        pytest.param(
            "x-anthropic-billing-header: 1",
            [("user", "a")],
            [("system", "x-anthropic-billing-header: 1"), ("user", "a")],
            id="a billing header as a system prompt",
        ),
        pytest.param(
            None,
            [("user", [{"type": "tool_result", "tool_use_id": "1", "content": "ok"}, {"type": "text", "text": "b"}])],
            [("tool", "ok"), ("user", "b")],
            id="tool result",
        ),
        pytest.param(
            None,
            [
                (
                    "user",
                    [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "tool_reference", "name": "f"}]}],
                )
            ],
            [("tool", ""), ("tool", [{"type": "tool_reference", "name": "f"}])],
            id="tool reference",
        ),
    ],
)
async def test_a_conversation_is_the_chat_that_vllm_makes_of_it(start, system, turns, same) -> None:
    client = start(speed=1000).client
    body = HI | {"messages": [{"role": role, "content": content} for role, content in turns]}
    if system is not None:
        body["system"] = system
    counted = await client.post(MESSAGES, body)
    usage = counted.json()["usage"]
    messages = [{"role": role, "content": content} for role, content in same]
    chat = await client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    expected = chat.json()["usage"]["prompt_tokens"]
    assert sum(value for name, value in usage.items() if name != "output_tokens") == expected
