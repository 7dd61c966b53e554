"""/v1/responses: the object, its events, and the responses that a server stores if it is told to.

Not covered: the bounds of its fields (`pairs`), reasoning and tool calls, which the emulator never generates.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.http.server import AnswerAborted
from worker.emulator.protocol.responses import is_plain

RESPONSES = "/v1/responses"


def events(reply: Any) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for event in reply.text.removesuffix("\n\n").split("\n\n"):
        name, _, data = event.partition("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.looptime
async def test_a_stream_adds_up_to_the_response_that_ends_it(start) -> None:
    body = {"input": "hello", "max_output_tokens": 4, "stream": True, "ignore_eos": True}
    told = events(await start().client.post(RESPONSES, body))
    assert [name for name, _ in told] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 4,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [data["sequence_number"] for _, data in told] == list(range(len(told)))
    assert all(data["type"] == name for name, data in told)
    text = "".join(data["delta"] for name, data in told if name.endswith("text.delta"))
    final = told[-1][1]["response"]
    assert final["output"][0]["content"][0]["text"] == text
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert final["usage"]["output_tokens"] == 4


async def test_the_same_prompt_is_the_same_as_in_a_chat(start) -> None:
    client = start(speed=1000).client
    chat = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], "max_tokens": 1}
    tokens = (await client.post("/v1/chat/completions", chat)).json()["usage"]["prompt_tokens"]
    body = {"instructions": "be", "input": "hi", "max_output_tokens": 1}
    assert (await client.post(RESPONSES, body)).json()["usage"]["input_tokens"] == tokens


async def test_nothing_is_stored_unless_the_server_is_configured_to(start) -> None:
    client = start(speed=1000).client
    made = (await client.post(RESPONSES, {"input": "hi", "max_output_tokens": 1})).json()
    missing = await client.get(f"{RESPONSES}/{made['id']}")
    assert (missing.status, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    assert (await client.post(RESPONSES, {"input": "hi", "background": True})).status == 400


async def test_a_stored_response_is_found_and_continued(start) -> None:
    client = start(speed=1000, enable_responses_store=True).client
    first = (await client.post(RESPONSES, {"input": "hi", "max_output_tokens": 3, "instructions": "be"})).json()
    assert (await client.get(f"{RESPONSES}/{first['id']}")).json() == first
    body = {"input": "more", "previous_response_id": first["id"], "max_output_tokens": 1}
    second = (await client.post(RESPONSES, body)).json()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first["output"][0]["content"][0]["text"]},
        {"role": "user", "content": "more"},
    ]
    chat = (await client.post("/v1/chat/completions", {"messages": turns, "max_tokens": 1})).json()
    assert second["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    refused = await client.post(f"{RESPONSES}/{first['id']}/cancel", {})
    assert refused.json()["error"]["message"] == "Cannot cancel a synchronous response."


@pytest.mark.looptime
async def test_a_response_is_made_in_the_background_followed_and_cancelled(start) -> None:
    harness = start(enable_responses_store=True, mean_output_tokens=100_000)
    body = {"input": "hi", "max_output_tokens": 50, "background": True}
    streamed, reply = harness.client.begin("POST", RESPONSES, body | {"stream": True, "request_id": "resp_1"})
    await asyncio.sleep(0.5)
    assert reply.text.startswith("event: response.created")
    looked_up = (await harness.client.get(f"{RESPONSES}/resp_1")).json()
    assert (looked_up["status"], looked_up["output"]) == ("queued", [])
    told = events(await harness.client.get(f"{RESPONSES}/resp_1?stream=true&starting_after=1"))
    assert told[0][0] == "response.output_item.added"
    assert told[-1][1]["response"]["status"] == "incomplete"
    assert events(await streamed)[2:] == told
    assert (await harness.client.get(f"{RESPONSES}/resp_1")).json() == told[-1][1]["response"]

    other = (await harness.client.post(RESPONSES, body | {"max_output_tokens": 500})).json()
    assert (other["status"], other["output"]) == ("queued", [])
    with pytest.raises(AnswerAborted):  # only the events of a stream are kept
        await harness.client.get(f"{RESPONSES}/{other['id']}?stream=true")
    await asyncio.sleep(1)
    assert harness.rank.async_engine.active == 1
    cancelled = await harness.client.post(f"{RESPONSES}/{other['id']}/cancel", {})
    assert cancelled.json() == other | {"status": "cancelled"}
    again = await harness.client.post(f"{RESPONSES}/{other['id']}/cancel", {})
    assert again.json()["error"]["message"] == "Cannot cancel a synchronous response."
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert harness.rank.async_engine.active == 0


@pytest.mark.looptime
async def test_a_streamed_response_is_stored_once_it_is_complete(start) -> None:
    client = start(enable_responses_store=True).client
    body = {"input": "hi", "max_output_tokens": 20, "stream": True, "request_id": "resp_1", "ignore_eos": True}
    streamed, _ = client.begin("POST", RESPONSES, body)
    await asyncio.sleep(0.1)
    assert (await client.get(f"{RESPONSES}/resp_1")).status == 404
    final = events(await streamed)[-1][1]["response"]
    assert (await client.get(f"{RESPONSES}/resp_1")).json() == final


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("starting_after=x", "{'type': 'int_parsing', 'loc': 'query.starting_after', 'msg': 'Input should be a valid "
         "integer, unable to parse string as an integer', 'input': 'x'}"),
        ("stream=maybe", "{'type': 'bool_parsing', 'loc': 'query.stream', 'msg': 'Input should be a valid boolean, "
         "unable to interpret input', 'input': 'maybe'}"),
    ],
)  # fmt: skip
async def test_the_query_of_a_look_up_is_checked(start, query: str, message: str) -> None:
    client = start(speed=1000, enable_responses_store=True).client
    made = (await client.post(RESPONSES, {"input": "hi", "max_output_tokens": 1})).json()
    refused = await client.get(f"{RESPONSES}/{made['id']}?{query}")
    param = f"query.{query.partition('=')[0]}"
    wanted = {"message": f"1 validation error:\n  {message}", "type": "Bad Request", "param": param, "code": 400}
    assert (refused.status, refused.json()["error"]) == (400, wanted)


async def test_json_is_made_where_json_is_asked_for(start) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 2}, "age": {"type": "integer", "minimum": 18}},
        "required": ["name", "age"],
    }
    body = {"input": "who?", "text": {"format": {"type": "json_schema", "name": "person", "schema": schema}}}
    made = (await start(speed=1000).client.post(RESPONSES, body)).json()
    assert json.loads(made["output"][0]["content"][0]["text"]) == {"name": "xx", "age": 18}
    assert made["status"] == "completed"


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
USER = {"role": "user", "content": "hi"}
SPACE = {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "f"}]}
PLAIN = st.sampled_from(
    [
        USER,
        USER | {"type": "message", "role": "assistant"},
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        CALL,
        {"type": "function_call_output", "call_id": "1", "output": "ok"},
    ]
)
FUNCTION = st.fixed_dictionaries(
    {"type": st.just("function"), "name": st.text()},
    optional={"description": st.text(), "parameters": st.just({"a": [1]}), "strict": st.booleans()},
)


@settings(max_examples=8, deadline=None)
@given(st.lists(PLAIN, max_size=4), st.lists(FUNCTION, max_size=3))
def test_what_is_plain_needs_none_of_openais_types(items: list[Any], tools: list[Any]) -> None:
    """Loading them takes 0.6 s."""
    from worker.emulator.protocol.openai_types import TypedResponsesRequest

    assert is_plain({"input": items, "tools": tools})
    TypedResponsesRequest.model_validate({"input": items, "tools": tools})
    assert not is_plain({"input": [*items, CALL | {"status": "x"}]})
    assert not is_plain({"input": items, "tools": [*tools, {"type": "web_search"}]})


@pytest.mark.parametrize(
    ("body", "beginning", "errors"),
    [
        pytest.param(
            {"input": [{"type": "x"}]},
            "237 validation errors:\n  {'type': 'string_type', 'loc': 'body.input', 'msg': 'Input should be a valid "
            "string', 'input': '<list of 1 items>'}\n  {'type': 'missing', 'loc': "
            "'body.input.0.EasyInputMessageParam.content', 'msg': 'Field required', 'input': '<dict of 1 items>'}\n",
            "  ...and 227 more errors",
            id="an unknown item",
        ),
        pytest.param(
            {"input": "a", "tools": [{"type": "function", "name": 5}]},
            "26 validation errors:\n  {'type': 'string_type', 'loc': 'body.tools.0.FunctionTool.name', 'msg': 'Input "
            "should be a valid string', 'input': '5'}\n",
            "  ...and 16 more errors",
            id="a tool's name",
        ),
        pytest.param(
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://h/i.png"}]}]},
            "tiny-llama is not a multimodal model",
            "",
            id="an image",
        ),
        pytest.param(
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "Unsupported chat content part type: 'input_file'.",
            "(parameter=type, value=input_file)",
            id="a file",
        ),
        pytest.param(
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "Encrypted content is not supported. (parameter=input)",
            "",
            id="encrypted reasoning",
        ),
        pytest.param(
            {"input": [{"type": "item_reference", "id": "x"}]},
            "Unsupported input item type: item_reference (parameter=input)",
            "",
            id="a reference",
        ),
        pytest.param(
            {"input": {}}, "Cannot apply chat template to an empty conversation.", "at least one message.", id="no item"
        ),
        pytest.param(
            {
                "input": "a",
                "tool_choice": {"type": "function", "name": "f"},
                "tools": [
                    {
                        "type": "namespace",
                        "name": name,
                        "description": "d",
                        "tools": [{"type": "function", "name": "f"}],
                    }
                    for name in "ab"
                ],
            },
            "Tool choice 'f' is ambiguous: it is defined in more than one namespace (a__f, b__f).",
            "(parameter=tool_choice)",
            id="an ambiguous tool",
        ),
    ],
)
async def test_malformed_items_and_tools_are_refused_in_vllms_words(start, body, beginning, errors) -> None:
    refused = await start(speed=1000).client.post(RESPONSES, body)
    message = refused.json()["error"]["message"]
    assert (refused.status, message.startswith(beginning), message.endswith(errors)) == (400, True, True), message


async def test_the_turns_and_tools_of_an_agent_become_one_prompt(start) -> None:
    """As a chat has it: the calls of one turn are one message, and a namespace's tool has a longer name."""
    client = start(speed=1000).client
    tool = {"name": "f", "description": None, "parameters": {"type": "object"}}
    items = [USER, CALL, CALL | {"call_id": "2"}, {"type": "function_call_output", "call_id": "1", "output": "ok"}]
    space = {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", **tool}]}
    made = await client.post(RESPONSES, {"input": items, "tools": [space], "max_output_tokens": 1})
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in "12"]
    chat = {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
        ],
        "tools": [{"type": "function", "function": tool | {"name": "n__f"}}],
        "tool_choice": "none",
        "max_tokens": 1,
    }
    same = await client.post("/v1/chat/completions", chat)
    assert made.json()["usage"]["input_tokens"] == same.json()["usage"]["prompt_tokens"]
    assert made.json()["tools"][0]["tools"][0]["name"] == "f"
