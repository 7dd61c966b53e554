"""/v1/responses: the object, its events, and the responses that a server stores if it is told to.

Not covered: the bounds of its fields (`pairs`), reasoning and tool calls, which the emulator never generates.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from runtime.http.server import AnswerAborted

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


async def test_tool_calls_of_earlier_turns_become_one_turn(start) -> None:
    client = start(speed=1000).client
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "ok"},
    ]
    made = await client.post(RESPONSES, {"input": items, "max_output_tokens": 1})
    assert made.status == 200
    unknown = await client.post(RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]})
    assert unknown.json()["error"]["message"] == "Unsupported input item type: item_reference (parameter=input)"
