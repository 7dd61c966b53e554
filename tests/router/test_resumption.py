"""Streams that go on at another worker when theirs fails: one stream for the client, whatever happened behind it.

Covered: what makes a stream go on, what the next worker is asked, what the client sees (ids, role, usage, the end),
which streams end with an error as before, and a worker process that is killed. Not covered: failures before the first
byte (test_retries.py), the states of a request (test_in_flight.py).
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from kvcache.tokens.tokenizer import Tokenizer
from router.core.retries import FailureCause
from tests.router.conftest import StartRouter
from tests.router.engine import (
    ANSWER,
    CHAT,
    COMPLETIONS,
    FAILURES,
    TOOL,
    Engine,
    Reader,
    Seen,
    aborts,
    body_of,
    prompts,
    resets,
    sse,
    stream,
)
from tests.router.fakes import DONE, Connection, Received, Script, answering, fake_workers
from tests.router.test_real_workers import real_workers


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("fail", [pytest.param(fail, id=name) for name, fail in FAILURES.items()])
async def test_a_stream_goes_on_at_another_worker(
    start_router: StartRouter, tokenizer: Tokenizer, path: str, fail: Script
) -> None:
    scripts = (Engine(tokenizer, after=3, fail=fail), Engine(tokenizer))
    async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True) as router:
        seen = await stream(
            router, path, *scripts, stream_options={"include_usage": True}, temperature=0.5, min_tokens=5
        )
        assert (seen.text, seen.finished, seen.done, seen.errors) == (ANSWER, ["length"], True, [])
        assert (len(seen.names), seen.roles, seen.ids) == (1, path == CHAT, [])
        prompt = len(prompts(tokenizer)[path])
        assert seen.usage == {
            "prompt_tokens": prompt, "total_tokens": prompt + 8, "completion_tokens": 8, "prompt_tokens_details": None,
        }  # fmt: skip
        first, rest = (worker.received[0] for worker in workers)
        assert (first.target, rest.target) == (path, COMPLETIONS)
        assert orjson.loads(rest.body) == {
            "prompt": prompts(tokenizer)[path] + tokenizer.encode(ANSWER)[:3],
            "max_tokens": 5, "min_tokens": 2, "stream": True, "return_token_ids": True,
            "stream_options": {"include_usage": True}, "temperature": 0.5,
        }  # fmt: skip
        assert sum(router.metric("resumed_streams_total", cause=cause.value) for cause in FailureCause) == 1
        assert sum(router.metric("broken_streams_total", cause=cause.value) for cause in FailureCause) == 0


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stream_that_nothing_happens_to_is_the_engines(
    start_router: StartRouter, tokenizer: Tokenizer, path: str
) -> None:
    async with fake_workers(Engine(tokenizer)) as workers:
        async with start_router(workers) as router:
            plain = (await router.client.post(path, json=body_of(path))).content
            assert b"return_token_ids" not in workers[0].received[0].body
        async with start_router(workers, resume_streams=True) as router:
            assert (await router.client.post(path, json=body_of(path))).content == plain


async def test_without_the_setting_the_stream_ends_with_an_error(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    scripts = (Engine(tokenizer, after=3, fail=resets), Engine(tokenizer))
    async with fake_workers(*scripts) as workers, start_router(workers) as router:
        seen = await stream(router, COMPLETIONS, *scripts)
        assert (len(seen.errors), seen.done, workers[1].received) == (1, True, [])


async def test_a_client_that_asked_for_token_ids_gets_them(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    scripts = (Engine(tokenizer, after=3, fail=resets), Engine(tokenizer))
    async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True) as router:
        seen = await stream(router, CHAT, *scripts, return_token_ids=True)
        assert (seen.text, seen.ids) == (ANSWER, tokenizer.encode(ANSWER))


async def test_a_stream_whose_text_is_complete_is_ended_here(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    class Cut(Engine):
        async def __call__(self, connection: Connection, request: Received) -> None:
            chunk = connection.chunk

            async def until_finished(data: bytes) -> None:
                if b'"usage"' in data:
                    connection.reset()
                    raise ConnectionError
                await chunk(data)

            connection.chunk = until_finished  # type: ignore[method-assign]
            await super().__call__(connection, request)

    async with fake_workers(Cut(tokenizer)) as workers, start_router(workers, resume_streams=True) as router:
        seen = await stream(router, COMPLETIONS, stream_options={"include_usage": True})
        assert (seen.text, seen.finished, seen.done, seen.errors) == (ANSWER, ["length"], True, [])
        assert (seen.usage["completion_tokens"], len(workers[0].received)) == (8, 1)


async def test_two_workers_that_leave_pass_a_stream_on_twice(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    scripts = (Engine(tokenizer, after=2, fail=aborts), Engine(tokenizer, after=2, fail=aborts), Engine(tokenizer))
    async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True) as router:
        seen = await stream(router, CHAT, *scripts, stream_options={"include_usage": True})
        assert (seen.text, seen.usage["completion_tokens"], len(seen.names)) == (ANSWER, 8, 1)
        assert orjson.loads(workers[2].received[0].body)["max_tokens"] == 4


async def test_a_chat_that_offers_tools_goes_on_as_a_chat(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    """The engine looks for calls of tools in the rest, too."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    class Calls(Engine):
        async def __call__(self, connection: Connection, request: Received) -> None:
            await connection.begin_stream()
            deltas = ({"role": "assistant", "content": ""}, {"content": " seven"}, {"tool_calls": [call]}, {})
            for delta in deltas:
                finish = None if delta else "tool_calls"
                choice = {"index": 0, "delta": delta, "finish_reason": finish, "token_ids": [1]}
                await connection.chunk(sse({"id": "y", "created": 1, "choices": [choice]}))
            await connection.chunk(DONE)
            await connection.end_stream()

    scripts = (Engine(tokenizer, after=3, fail=resets), Calls(tokenizer))
    async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True) as router:
        seen = await stream(router, CHAT, *scripts, tools=[TOOL])
        assert (seen.text, seen.finished, seen.roles, seen.done) == (" four five six seven", ["tool_calls"], 1, True)
        assert len(seen.names) == 1
        assert [choice["delta"]["tool_calls"] for event in seen.events for choice in event["choices"]
                if "tool_calls" in choice["delta"]] == [[call]]  # fmt: skip
        rest = workers[1].received[0]
        assert rest.target == CHAT
        asked = orjson.loads(rest.body)
        assert asked["messages"][-1] == {"role": "assistant", "content": " four five six"}
        assert (asked["tools"], asked["max_tokens"], asked["continue_final_message"]) == ([TOOL], 5, True)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(answering(400), id="refuses"),
        pytest.param(answering(500), id="fails"),
        pytest.param(answering(200), id="answers with no stream"),
        pytest.param(resets, id="breaks"),
    ],
)
async def test_a_stream_that_nobody_continues_ends_with_the_engines_error(
    start_router: StartRouter, tokenizer: Tokenizer, second: Script
) -> None:
    first = Engine(tokenizer, after=3, fail=resets)
    scripts = (first, second)
    async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True, eject_after=0) as router:
        seen = await stream(router, COMPLETIONS, first)
        assert (seen.text, seen.done) == (" four five six", True)
        assert router.metric("requests_total", code="200", strategy="round_robin") == 1
        assert seen.errors[0]["error"]["type"] == "InternalServerError"
        assert workers[1].received
        assert sum(router.metric("broken_streams_total", cause=cause.value) for cause in FailureCause) == 1


async def test_tokens_of_an_unfinished_character_are_generated_again(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    """vLLM repeats the whole prompt after a prompt that ends within a character."""
    answer = " a 😀 b 日本 c"
    tokens = tokenizer.encode(answer)
    for after in range(1, len(tokens)):
        for of in (1, 2):
            scripts = (Engine(tokenizer, answer, after, resets, of), Engine(tokenizer, answer))
            async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True) as router:
                seen = await stream(
                    router, COMPLETIONS, *scripts, max_tokens=len(tokens), stream_options={"include_usage": True}
                )
                assert (seen.text, seen.errors) == (answer, []), after
                assert seen.usage["completion_tokens"] == len(tokens)
                if workers[1].received:
                    asked = orjson.loads(workers[1].received[0].body)["prompt"]
                    assert not tokenizer.decode(asked).endswith("\ufffd")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        pytest.param("even ei", " four five six s", id="across the seam"),
        pytest.param(["ine", "zz"], " four five six seven eight n", id="after the seam"),
        pytest.param("nothing", ANSWER, id="nowhere"),
    ],
)
async def test_a_stream_with_stop_strings_goes_on(
    start_router: StartRouter, tokenizer: Tokenizer, path: str, stop: Any, text: str
) -> None:
    scripts = (Engine(tokenizer, after=4, fail=resets), Engine(tokenizer))
    async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True) as router:
        seen = await stream(router, path, *scripts, stop=stop, stream_options={"include_usage": True})
        assert (seen.text, seen.done, seen.errors, len(seen.names)) == (text, True, [], 1)
        assert seen.finished == ["length" if text == ANSWER else "stop"]
        assert seen.usage is not None
        assert orjson.loads(workers[1].received[0].body)["stop"] == stop


async def test_nothing_follows_the_end_at_a_stop_string_across_the_seam(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    class Overlapping(Engine):
        """Sends each event together with the first bytes of the next."""

        async def __call__(self, connection: Connection, request: Received) -> None:
            chunk, held = connection.chunk, b""

            async def with_next(data: bytes) -> None:
                nonlocal held
                piece, held = held + data[:9], data[9:]
                await chunk(piece)

            connection.chunk = with_next  # type: ignore[method-assign]
            await super().__call__(connection, request)

    scripts = (Engine(tokenizer, after=4, fail=resets), Overlapping(tokenizer))
    async with fake_workers(*scripts) as workers, start_router(workers, resume_streams=True) as router:
        seen = await stream(router, COMPLETIONS, *scripts, stop="even ei")
        assert (seen.text, seen.finished, seen.done) == (" four five six s", ["stop"], True)


@pytest.mark.process
async def test_every_stream_completes_when_a_worker_is_killed(start_router: StartRouter) -> None:
    """Each text equals that of a run in which nothing happens."""
    async with real_workers(2, 2.0) as workers, start_router(workers, resume_streams=True, retry_deadline=60) as router:
        paths = [(COMPLETIONS, CHAT)[number % 2] for number in range(16)]
        fields = {"max_tokens": 80, "ignore_eos": True, "temperature": 0}

        async def ask(number: int, *begun: Reader) -> Seen:
            said = f"Stream {number}"
            asked = (
                {"prompt": said} if paths[number] == COMPLETIONS else {"messages": [{"role": "user", "content": said}]}
            )
            return await stream(router, paths[number], *begun, **fields, **asked)

        undisturbed = await asyncio.gather(*(ask(number) for number in range(16)))

        async def disturb() -> None:
            readers = [Reader() for _ in range(16)]
            running = [asyncio.create_task(ask(number, reader)) for number, reader in enumerate(readers)]
            for reader in readers:
                await reader.reads.wait()
            await workers[0].kill()
            disturbed = await asyncio.gather(*running)
            assert [seen.text for seen in disturbed] == [seen.text for seen in undisturbed]
            assert all(seen.done and not seen.errors and len(seen.names) == 1 for seen in disturbed)

        await disturb()
        while not router.metric("resumed_streams_total", cause="broken"):
            # The machine was held up for so long that every stream had ended when the worker died.
            await workers[0].start()
            await router.ready(2)
            await disturb()
