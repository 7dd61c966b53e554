"""Which streams can go on at another worker, by their request and by what has come of the answer, and stop strings
across the seam.

Not covered: streams of a router (test_resumption.py).
"""

from __future__ import annotations

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
from router.core.retries import FailureCause
from router.server.prompts import PromptReader
from router.server.resumable import asking_for_ids, stream_request
from router.server.resumption import Resumption, Resumptions
from router.server.stops import SeamStops
from router.upstream.interface import UpstreamRequest
from tests.router.engine import (
    CHAT,
    COMPLETIONS,
    TOOL,
    body_of,
    sse,
)


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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
