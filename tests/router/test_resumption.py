"""Streams that go on at another worker when theirs fails: one stream for the client, whatever happened behind it.

Covered: what makes a stream go on, what the next worker is asked, what the client sees (ids, role, usage, the end),
which streams end with an error as before, and a worker process that is killed. Not covered: failures before the first
byte (test_retries.py), the states of a request (test_in_flight.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcache.keys import PrefixKeys, pack_tokens
from kvcache.prompts import chat_request_prompt
from kvcache.tokens.tokenizer import Tokenizer
from router.core.catalogue import OWN_TOKENIZER, Catalogue, Served
from router.core.decision import RouteRequest
from router.server.prompts import PromptReader
from router.server.resumable import asking_for_ids, stream_request
from router.server.resumption import Resumption, Resumptions
from router.server.stops import SeamStops
from router.upstream.interface import FailureCause, UpstreamRequest
from tests.router.conftest import RunningRouter, StartRouter
from tests.router.fakes import DONE, ERROR_EVENT, Connection, Received, Script, answering, fake_workers
from tests.router.test_real_workers import real_workers

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


async def test_a_chat_that_offers_tools_goes_on_only_with_the_same_tokens(tokenizer: Tokenizer) -> None:
    read_alike = chat_request_prompt(body_of(CHAT, tools=[TOOL]), tokenizer)
    for prompt, same in ((read_alike, True), (read_alike[:-1], False)):
        stream = resumption(tokenizer, tools=[TOOL])

        async def read(path: str, body: bytes) -> RouteRequest:
            tokens = chat_request_prompt(orjson.loads(body), tokenizer)
            return RouteRequest(PrefixKeys(pack_tokens(tokens), 16), len(tokens), streaming=True)

        stream._read = read
        stream.begin()
        role = {"index": 0, "delta": {"role": "assistant"}}
        stream.push(sse({"id": "x", "choices": [role], "prompt_token_ids": prompt}))
        stream.push(chunk({"content": " four"}, tokenizer.encode(" four")))
        assert await stream.go_on(FailureCause.BROKEN) is same


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


def texts(stops: Sequence[str], text: str, pieces: Sequence[int]) -> list[str]:
    """The pieces in which an engine shows a text of these lengths, until a stop string; the last piece is the rest."""
    window, shown, done, found = max(map(len, stops)) - 1, 0, 0, []
    for size in pieces:
        done = min(done + size, len(text))
        for stop in stops:
            at = text[:done].find(stop)
            if at >= 0:
                return [*found, text[shown:at]]
        found.append(text[shown : max(done - window, shown)])
        shown = max(done - window, shown)
    return [*found, text[shown:done]]


@settings(max_examples=100)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2),
    st.text("abc", min_size=2, max_size=30),
    st.integers(1, 29),
    st.lists(st.integers(1, 3), min_size=30, max_size=30),
)
def test_a_stop_string_is_found_across_the_seam(stops: list[str], text: str, seam: int, pieces: list[int]) -> None:
    """The joined text is that of one engine, wherever the seam is."""
    undisturbed = "".join(texts(stops, text, pieces))
    seam = min(seam, len(text))
    window = max(map(len, stops)) - 1
    if any(stop in text[:seam] for stop in stops) or seam <= window:
        return
    before = text[: seam - window]
    watch = SeamStops(text[seam - window : seam], stops)
    after = ""
    parts = texts(stops, text[seam:], pieces)
    for number, part in enumerate(parts):
        after += watch.push(part, last=number == len(parts) - 1)
        if watch.stopped_by is not None:
            break
    assert before + after == undisturbed


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


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2}, {"logprobs": 1}, {"logprobs": 0}, {"echo": True}, {"stop": [1]}, {"stop": [""]}, {"seed": 1},
        {"presence_penalty": 0.5}, {"frequency_penalty": -1}, {"suffix": "x"}, {"best_of": 2}, {"use_beam_search": 1},
        {"response_format": {"type": "json_object"}}, {"structured_outputs": {"regex": "a"}}, {"bad_words": ["x"]},
        {"prompt_logprobs": 0}, {"kv_transfer_params": {"a": 1}}, {"vllm_xargs": {"a": 1}}, {"unheard_of": 1},
        {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"stream": False}, {"max_tokens": "8"}, {"logprobs": True},
    ],
    ids=str,
)  # fmt: skip
def test_other_completions_do_not_go_on(fields: dict[str, Any]) -> None:
    assert stream_request(COMPLETIONS, orjson.dumps(body_of(COMPLETIONS, **fields))) is None


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    "fields",
    [{"tools": [TOOL], "tool_choice": "required"}, {"tools": [TOOL | {"function": {"name": "f", "strict": True}}]},
     {"tools": [TOOL], "tool_choice": TOOL}, {"tools": [TOOL], "stop": "x"},
     {"stop": "x", "min_tokens": 2}, {"messages": [IMAGE]}, {"top_logprobs": 2},
     {"logprobs": True}, {"functions": [{}]}, {"include_reasoning": False}, {"modalities": ["audio"]}],
    ids=str,
)  # fmt: skip
def test_other_chats_do_not_go_on(fields: dict[str, Any]) -> None:
    assert stream_request(CHAT, orjson.dumps(body_of(CHAT, **fields))) is None


@pytest.mark.parametrize(
    "fields",
    [{"n": 1, "stop": [], "logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0, "tools": []},
     {"seed": 1, "temperature": 0},
     {"tools": [TOOL], "tool_choice": "none"}, {"response_format": {"type": "text"}, "include_reasoning": True},
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}],
    ids=str,
)  # fmt: skip
def test_fields_that_say_nothing_stop_no_stream(fields: dict[str, Any]) -> None:
    assert stream_request(CHAT, orjson.dumps(body_of(CHAT, **fields))) is not None


async def unread(path: str, body: bytes) -> RouteRequest:
    return RouteRequest(None, None, streaming=True)


def resumption(tokenizer: Tokenizer, longest: int | None = None, **fields: Any) -> Resumption:
    request = stream_request(CHAT, orjson.dumps(body_of(CHAT, **fields)))
    assert request is not None
    return Resumption(request, [], tokenizer.decode, unread, longest)


def chunk(delta: dict[str, Any], ids: Sequence[int] = (), finish: str | None = None) -> bytes:
    return sse({"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "token_ids": [*ids]}]})


ROLE = sse({"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant"}}], "prompt_token_ids": [1, 2]})


@pytest.mark.parametrize(
    ("events", "goes_on"),
    [
        pytest.param([({"content": " four"}, " four")], True, id="text"),
        pytest.param([({"reasoning": " four"}, " four")], False, id="while it reasons"),
        pytest.param([({"reasoning": " one"}, " one"), ({"content": " four"}, " four")], True, id="after it reasoned"),
        pytest.param(
            [({"content": " a"}, " a"), ({"tool_calls": [{"index": 0}]}, " f")], False, id="within a tool call"
        ),
        pytest.param([({"content": " four"}, "")], False, id="no ids"),
        pytest.param([({"content": " four"}, " five")], False, id="the ids are of another text"),
        pytest.param([], False, id="nothing yet"),
    ],
)
async def test_what_has_come_decides_whether_a_stream_can_go_on(
    tokenizer: Tokenizer, events: list[tuple[dict[str, Any], str]], goes_on: bool
) -> None:
    stream = resumption(tokenizer)
    stream.begin()
    stream.push(ROLE + b"".join(chunk(delta, tokenizer.encode(text)) for delta, text in events))
    assert await stream.go_on(FailureCause.BROKEN) is goes_on


async def test_a_chat_without_a_limit_may_use_what_is_left_of_the_context(tokenizer: Tokenizer) -> None:
    stream = resumption(tokenizer, longest=100, max_tokens=None)
    stream.begin()
    stream.push(ROLE + chunk({"content": " four"}, tokenizer.encode(" four")))
    assert await stream.go_on(FailureCause.BROKEN)
    assert orjson.loads(stream.request().body)["max_tokens"] == 97


async def test_a_stream_goes_on_by_what_is_known_of_its_own_model(tokenizer: Tokenizer) -> None:
    served = [Served("a", "a", False, OWN_TOKENIZER, 4096), Served("b", "b", False, "b", 64)]
    reader = PromptReader(None, 16, lambda: Catalogue({each.name: each for each in served}, complete=True))
    reader.tokenizers["b"] = tokenizer

    def begun(model: str) -> Resumption | None:
        body = orjson.dumps(body_of(CHAT, model=model, max_tokens=None))
        request = UpstreamRequest("POST", CHAT, [], body, repeatable=True)
        route = RouteRequest(None, None, streaming=True, model=model)
        return Resumptions(reader.known, unread).of(request, route)

    assert begun("a") is None  # its tokenizer is not loaded
    stream = begun("b")
    assert stream is not None
    stream.begin()
    stream.push(ROLE + chunk({"content": " four"}, tokenizer.encode(" four")))
    assert await stream.go_on(FailureCause.BROKEN)
    assert orjson.loads(stream.request().body)["max_tokens"] == 64 - 3
    reader.close()


async def test_garbage_passes_and_ends_the_hope_of_going_on(tokenizer: Tokenizer) -> None:
    for garbage in (b"data: {\n\n", b"data: [1]\n\n", sse({"choices": 7}), sse({"choices": [{}, {}]})):
        stream = resumption(tokenizer)
        stream.begin()
        assert stream.push(ROLE + garbage).endswith(garbage)
        stream.push(chunk({"content": " four"}, tokenizer.encode(" four")))
        assert not await stream.go_on(FailureCause.BROKEN)


ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2**40, "a", "", " four", [], [1], ["a"], [None], {}, {"content": "x"}, {"content": 7},
     {"role": "a"}, {"tool_calls": [1]}, {"reasoning": "x"}, {"completion_tokens": "x"}, {"code": 500}]
)  # fmt: skip
CHOICES = st.lists(
    st.dictionaries(st.sampled_from(["delta", "text", "token_ids", "prompt_token_ids", "finish_reason"]), ODD) | ODD,
    max_size=2,
)
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"choices": CHOICES}, optional=dict.fromkeys(("id", "usage", "error", "prompt_token_ids"), ODD)
    )
    | ODD,
    max_size=3,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EVENTS, EVENTS, st.booleans())
async def test_no_event_of_a_worker_is_an_error_here(
    tokenizer: Tokenizer, first: list[Any], rest: list[Any], stops: bool
) -> None:
    stream = resumption(tokenizer, stop=["bc"] if stops else [])
    stream.begin()
    stream.push(ROLE + chunk({"content": " fou" if stops else " four"}, tokenizer.encode(" four")))
    stream.push(b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in first))
    if await stream.go_on(FailureCause.BROKEN):
        stream.begin()
        stream.push(b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in rest))
        await stream.go_on(FailureCause.BROKEN)


def test_the_added_field_prevails(tokenizer: Tokenizer) -> None:
    for body in (b'{"a":{"b":1}}', b'{"return_token_ids":false, "a":1 } \n'):
        assert orjson.loads(asking_for_ids(body)) == {**orjson.loads(body), "return_token_ids": True}


@pytest.mark.process
async def test_every_stream_completes_when_a_worker_is_killed(start_router: StartRouter) -> None:
    """Each text equals that of a run in which nothing happens."""
    async with real_workers(2, 2.0) as workers, start_router(workers, resume_streams=True, retry_deadline=10) as router:
        paths = [(COMPLETIONS, CHAT)[number % 2] for number in range(16)]
        fields = {"max_tokens": 80, "ignore_eos": True, "temperature": 0}

        async def ask(number: int, *begun: Reader) -> Seen:
            said = f"Stream {number}"
            asked = (
                {"prompt": said} if paths[number] == COMPLETIONS else {"messages": [{"role": "user", "content": said}]}
            )
            return await stream(router, paths[number], *begun, **fields, **asked)

        undisturbed = await asyncio.gather(*(ask(number) for number in range(16)))
        readers = [Reader() for _ in range(16)]
        running = [asyncio.create_task(ask(number, reader)) for number, reader in enumerate(readers)]
        for reader in readers:
            await reader.reads.wait()
        await workers[0].kill()
        disturbed = await asyncio.gather(*running)
        assert [seen.text for seen in disturbed] == [seen.text for seen in undisturbed]
        assert all(seen.done and not seen.errors and len(seen.names) == 1 for seen in disturbed)
        assert router.metric("resumed_streams_total", cause="broken") > 0
