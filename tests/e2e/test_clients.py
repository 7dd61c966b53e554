"""Clients that people use (openai, anthropic, langchain) work against a router with emulated workers behind it.

Each client is imported where it is used: they take seconds, which everyone who collects the tests would pay.

Not covered: `vllm bench serve`, which comes with gigabytes of vLLM (it was run by hand against router and emulator);
the content of errors field by field (tests/worker/pairs); clients that disconnect (test_convergence.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.support import ClusterUnderTest, StartCluster

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

QUESTION = "What is held in a KV cache, and for how long? " * 20
WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster) -> AsyncIterator[ClusterUnderTest]:
    """One for all clients: none of them leaves anything that another could notice but cached blocks."""
    async with start_cluster(workers=2) as cluster:
        yield cluster


async def served(cluster: ClusterUnderTest) -> str:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused") as client:
        return (await client.models.list()).data[0].id


async def test_openai(cluster: ClusterUnderTest) -> None:
    import openai

    model = await served(cluster)
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0) as client:
        completion = await client.completions.create(model=model, prompt="def hello():", max_tokens=8)
        assert completion.object == "text_completion"
        assert completion.usage is not None
        assert completion.usage.completion_tokens <= 8
        assert completion.choices[0].finish_reason in ("length", "stop")

        messages = [{"role": "user", "content": "Tell me about KV caches, " * 40}]
        chat = await client.chat.completions.create(model=model, messages=messages, max_tokens=5)
        assert chat.choices[0].message.role == "assistant"
        again = await client.chat.completions.create(model=model, messages=messages, max_tokens=5)
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens > 0, "the second request lands where the first one was"

        stream = await client.chat.completions.create(
            model=model, messages=messages, max_tokens=7, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 7
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"

        text = await client.completions.create(model=model, prompt=[1, 2, 3], max_tokens=4, stream=True)
        assert len([chunk async for chunk in text]) >= 1


async def test_error_classes_of_the_openai_client(cluster: ClusterUnderTest) -> None:
    import openai

    model = await served(cluster)
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
            await client.completions.create(model="nope", prompt="x")
        with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1, got 0"):
            await client.completions.create(model=model, prompt="x", max_tokens=0)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens"):
            await client.completions.create(model=model, prompt=[7] * 5000)
        response = await client.completions.with_raw_response.create(model=model, prompt="x", max_tokens=1)
        assert response.headers["x-kvcluster-worker"] in ("e2e-worker-0", "e2e-worker-1")


async def test_anthropic(cluster: ClusterUnderTest) -> None:
    import anthropic

    model = await served(cluster)
    async with anthropic.AsyncAnthropic(base_url=cluster.url, api_key="unused", max_retries=0) as client:
        asked = [{"role": "user", "content": QUESTION}]
        answer = await client.messages.create(model=model, max_tokens=6, system="Be brief.", messages=asked)
        assert (answer.role, answer.content[0].type) == ("assistant", "text")
        assert 0 < answer.usage.output_tokens <= 6
        counted = await client.messages.count_tokens(model=model, system="Be brief.", messages=asked)
        used = answer.usage
        cached = (used.cache_creation_input_tokens or 0) + (used.cache_read_input_tokens or 0)
        assert counted.input_tokens == used.input_tokens + cached
        history = [
            *asked,
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Ulm"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain"}]},
        ]
        async with client.messages.stream(
            model=model, max_tokens=7, messages=history, tools=[WEATHER], tool_choice={"type": "none"}
        ) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "".join(block.text for block in final.content if block.type == "text")
        assert final.stop_reason in ("max_tokens", "end_turn")
        with pytest.raises(anthropic.APIStatusError) as refused:
            await client.messages.create(model="nope", max_tokens=6, messages=asked)
        assert refused.value.status_code == 404


async def test_responses_of_the_openai_client(cluster: ClusterUnderTest) -> None:
    import openai

    model = await served(cluster)
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0) as client:
        answer = await client.responses.create(
            model=model, input=QUESTION, instructions="Be brief.", max_output_tokens=6
        )
        assert answer.usage is not None
        assert 0 < answer.usage.output_tokens <= 6
        kinds = [
            event.type
            async for event in await client.responses.create(
                model=model, input=QUESTION, max_output_tokens=5, stream=True
            )
        ]
        assert kinds[0] == "response.created"
        assert "response.output_text.delta" in kinds
        assert kinds[-1] in ("response.completed", "response.incomplete")


async def test_langchain(cluster: ClusterUnderTest) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_openai import ChatOpenAI, OpenAI

    async with httpx.AsyncClient() as client:
        place: dict[str, Any] = {
            "base_url": f"{cluster.url}/v1",
            "api_key": "unused",
            "model": await served(cluster),
            "http_async_client": client,
            "max_retries": 0,
        }
        chat = ChatOpenAI(**place, max_completion_tokens=6)
        history = [
            SystemMessage("Be brief."),
            HumanMessage(QUESTION),
            AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Ulm"}, "id": "t1"}]),
            ToolMessage("rain", tool_call_id="t1"),
        ]
        answer = await chat.bind_tools([WEATHER_FUNCTION], tool_choice="none").ainvoke(history)
        assert answer.usage_metadata is not None
        assert 0 < answer.usage_metadata["output_tokens"] <= 6
        whole, *pieces = [piece async for piece in chat.astream(history, stream_usage=True)]
        for piece in pieces:
            whole += piece
        assert whole.usage_metadata is not None
        assert whole.usage_metadata["output_tokens"] <= 6
        completion = OpenAI(**place, max_tokens=5)
        ((generation,),) = (await completion.agenerate([QUESTION])).generations
        assert generation.generation_info is not None
        assert generation.generation_info["finish_reason"] in ("length", "stop")


def _function() -> dict[str, object]:
    return {
        "type": "function",
        "function": {
            "name": WEATHER["name"], "description": WEATHER["description"], "parameters": WEATHER["input_schema"],
        },
    }  # fmt: skip


WEATHER_FUNCTION = _function()
