"""The real OpenAI client against a router with emulated workers behind it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.process


async def test_the_openai_client_works_against_the_router(start_cluster):
    import openai

    async with (
        start_cluster(workers=2) as cluster,
        openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        models = await client.models.list()
        model = models.data[0].id

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


async def test_its_error_classes(start_cluster):
    import openai

    async with (
        start_cluster(workers=1) as cluster,
        openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
            await client.completions.create(model="nope", prompt="x")
        model = (await client.models.list()).data[0].id
        with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1, got 0"):
            await client.completions.create(model=model, prompt="x", max_tokens=0)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens"):
            await client.completions.create(model=model, prompt=[7] * 5000)
        response = await client.completions.with_raw_response.create(model=model, prompt="x", max_tokens=1)
        assert response.headers["x-kvcluster-worker"] == "e2e-worker-0"
