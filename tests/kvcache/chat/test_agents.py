"""Requests of the Messages and Responses APIs are read as vLLM reads them.

Covers: prompts recorded from a running engine, token by token; what depends on the chat template; what is not read;
that no odd value gets past the reader unseen. Not covered: images and files (they raise, and the engine reads them),
responses that continue a stored one, engines other than the recorded version (tests/real_vllm does).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.chat import anthropic, responses
from kvcache.chat.request import ChatOptions, ChatRenderer, ChatRequestError
from kvcache.prompts import chat_request_prompt, messages_chat_fields, responses_chat_fields
from kvcache.tokens.tokenizer import Tokenizer
from tests.kvcache.conftest import VLLM_DATA

RECORDED = json.loads((VLLM_DATA / "agent_prompts.json").read_bytes())["pairs"]
READERS = {"/v1/messages": messages_chat_fields, "/v1/responses": responses_chat_fields}
MAX_MODEL_LEN = 2048
"""Of the engine that they were recorded with."""

HI = [{"role": "user", "content": "hi"}]
EVERYTHING = "{{ messages | tojson }}{{ tools | tojson }}{{ reasoning_effort }}"
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}|{% endfor %}"
)


def renderer(source: str = EVERYTHING) -> ChatRenderer:
    return ChatRenderer({"default": source}, {}, ChatOptions())


def test_requests_become_the_tokens_that_vllm_computes(recorded_model: Tokenizer) -> None:
    for pair in RECORDED:
        fields = READERS[pair["path"]](pair["body"], recorded_model)
        ids = chat_request_prompt(fields, recorded_model, MAX_MODEL_LEN)
        expected = (pair["tokens"], pair["digest"])
        assert (len(ids), hashlib.sha256(array("I", ids).tobytes()).hexdigest()[:16]) == expected, pair["body"]


def test_the_recorded_requests_cover_every_kind_of_block_and_item() -> None:
    bodies = [pair["body"] for pair in RECORDED]
    fields = {name for body in bodies for name in body}
    assert fields >= {"system", "tools", "tool_choice", "output_config", "thinking", "chat_template_kwargs",
                      "instructions", "reasoning", "truncation"}  # fmt: skip
    contents = [message["content"] for body in bodies for message in body.get("messages", ())]
    blocks = {block["type"] for content in contents if isinstance(content, list) for block in content}
    assert blocks >= {"text", "tool_use", "tool_result", "thinking", "redacted_thinking", "tool_removal"}
    inputs = [body["input"] for body in bodies if isinstance(body.get("input"), list)]
    assert {item.get("type", "message") for items in inputs for item in items} == {
        "message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output",
    }  # fmt: skip
    assert {tool["type"] for body in bodies if "input" in body for tool in body.get("tools", ())} == {
        "function", "custom", "namespace", "web_search_preview",
    }  # fmt: skip


def test_system_messages_become_one_where_the_template_wants_one() -> None:
    turns = [*HI, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
    body = {"system": [{"type": "text", "text": "a"}], "messages": turns}
    strict = renderer(STRICT)
    assert strict.render(anthropic.chat_fields(body, strict)) == "system:ab|user:hi|user:c|"
    lax = renderer("{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}")
    assert lax.render(anthropic.chat_fields(body, lax)) == "system:a|user:hi|system:b|user:c|"


@pytest.mark.parametrize(
    ("template", "effort"),
    [
        pytest.param("{{ reasoning_effort }}", "none", id="it writes the effort out"),
        pytest.param("{{ enable_thinking }}", "none", id="it turns thinking off"),
        pytest.param("{{ messages[0].content }}", "low", id="it knows no effort"),
        pytest.param("{{ raise_exception('x') if reasoning_effort == 'none' }}", "low", id="it refuses none"),
    ],
)
def test_disabled_thinking_is_an_effort_that_the_template_heeds(template: str, effort: str) -> None:
    fields = anthropic.chat_fields({"messages": HI, "thinking": {"type": "disabled"}}, renderer(template))
    assert fields["reasoning_effort"] == effort


def test_the_effort_of_disabled_thinking_may_be_set() -> None:
    chat = ChatRenderer({"default": EVERYTHING}, {}, ChatOptions(anthropic_disabled_thinking_effort="high"))
    assert chat.disabled_thinking_effort == "high"


def test_a_call_without_an_id_is_read_only_with_one_of_the_engines() -> None:
    body = {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]}
    with pytest.raises(ChatRequestError, match="clock"):
        anthropic.chat_fields(body, renderer())
    (message,) = anthropic.chat_fields(body, renderer(), call_id="call_1")["messages"]
    assert message["tool_calls"][0]["id"] == "call_1"


def test_calls_of_the_responses_api_are_written_in_their_own_order() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"b": 1}'}
    written = renderer("{{ messages[0].tool_calls | tojson }}").render(responses.chat_fields({"input": [call]}))
    assert written == '[{"id": "c", "function": {"name": "f", "arguments": {"b": 1}}, "type": "function"}]'


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"messages": [{"role": "user", "content": [IMAGE]}]}, id="an image"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [IMAGE]}]}]},
            id="an image in a tool's answer",
        ),
        pytest.param({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, id="a document"),
        pytest.param({"messages": [{"role": "tool", "content": "x"}]}, id="another role"),
        pytest.param({"messages": []}, id="no message"),
        pytest.param({"messages": HI, "tools": [{"name": "f"}]}, id="a tool without a schema"),
        pytest.param(
            {
                "messages": [
                    *HI,
                    {
                        "role": "system",
                        "content": [{"type": "tool_addition", "tool": {"type": "tool_reference", "name": "f"}}],
                    },
                ]
            },
            id="an undeclared tool",
        ),
        pytest.param({"input": "hi", "previous_response_id": "resp_1"}, id="a stored response"),
        pytest.param({"input": [{"type": "item_reference", "id": "x"}]}, id="a reference"),
        pytest.param(
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]}, id="an input image"
        ),
        pytest.param(
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, id="encrypted reasoning"
        ),
        pytest.param({"input": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, id="a refusal"),
        pytest.param({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, id="a call without an id"),
        pytest.param({"input": {}}, id="no list"),
    ],
)
def test_what_cannot_be_read_exactly_is_not_read(body: dict[str, Any]) -> None:
    chat = renderer()
    with pytest.raises(ChatRequestError):
        chat.render(anthropic.chat_fields(body, chat) if "messages" in body else responses.chat_fields(body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["text", "tool_use", "message", "x", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["type", "role", "content", "text", "input", "tool", "name", "id", "call_id", "output", "summary", "source"]
    ), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60)
@given(JSON, JSON, JSON, st.sampled_from(["system", "tools", "thinking", "tool_choice", "output_config", "reasoning"]))
def test_no_body_is_too_strange(items: Any, part: Any, value: Any, name: str) -> None:
    chat = renderer()
    for given_items in (
        items,
        [items, part],
        [{"role": "user", "content": [part]}],
        [{"type": "reasoning", "summary": part}],
    ):
        with contextlib.suppress(ChatRequestError):
            chat.render(anthropic.chat_fields({"messages": given_items, name: value}, chat))
        with contextlib.suppress(ChatRequestError):
            chat.render(responses.chat_fields({"input": given_items, name: value}))
