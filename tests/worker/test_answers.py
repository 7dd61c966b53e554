"""Answers have the fields of a real vLLM's, in the same order, and figures that fit the request.

Not covered: errors (`test_errors.py`), timing of streams (`test_streaming.py`), and the many requests of `pairs`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

HELLO = {"model": "tiny-llama", "messages": [{"role": "user", "content": "hello"}]}
WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9 0"

# What depends on the tokenizer, the clock and chance; everything else is compared as it is.
VOLATILE = {"id", "created", "text", "content", "system_fingerprint", "tokens", "token_strs", "count", "prompt", "root"}


def shape(value: Any, key: str = "") -> Any:
    """A JSON value with what is volatile replaced by its type; objects become pairs, to compare their order."""
    match value:
        case dict():
            return [(name, shape(entry, name)) for name, entry in value.items()]
        case list() if value and key.endswith(("tokens", "ids", "strs")):
            return f"list of {type(value[0]).__name__}"
        case list():
            return [shape(entry) for entry in value]
        case int() if key.endswith("tokens") and not isinstance(value, bool):
            return "tokens"
        case _ if key in VOLATILE:
            return type(value).__name__
        case _:
            return value


def sent_headers(capture: Any) -> list[tuple[str, str]]:
    """A capture's headers without those that the HTTP server adds."""
    own = [(name, value) for name, value in capture.headers if name not in ("date", "server", "transfer-encoding")]
    return [(name, "" if name == "content-length" else value) for name, value in own]


@pytest.mark.parametrize(
    "name",
    [
        "chat", "chat_again", "chat_n2", "chat_nomodel_field", "chat_return_token_ids", "chat_salt",
        "completion_return_token_ids", "completion_text", "detokenize", "err_missing_model", "err_unknown_field",
        "get_health", "get_load", "get_ping", "get_v1_models", "get_version", "post_ping", "tokenize", "tokenize_chat",
        "tokenize_strs",
    ],
)  # fmt: skip
async def test_an_answer_has_the_shape_of_vllms(name, start, capture) -> None:
    real = capture(name)
    reply = await start(speed=1000).client.request(real.method, real.path, real.request)
    assert reply.status == real.status
    assert [(name, "" if name == "content-length" else value) for name, value in reply.headers] == sent_headers(real)
    if real.body.strip():
        assert shape(reply.json()) == shape(json.loads(real.body))
    else:
        assert reply.body == b""


@pytest.mark.parametrize(
    "name",
    [
        "chat_stream",
        "chat_stream_nousage",
        "chat_stream_return_token_ids",
        "completion_stream",
        "completion_stream_cont_usage",
        "completion_stream_nousage",
    ],
)
@pytest.mark.looptime
async def test_a_stream_has_vllms_chunks(name, start, capture) -> None:
    real = capture(name)
    reply = await start().client.request(real.method, real.path, real.request)
    assert (reply.status, reply.headers) == (real.status, sent_headers(real))
    assert [shape(chunk) for chunk in reply.chunks] == [shape(chunk) for chunk in real.chunks]
    assert reply.text.endswith("data: [DONE]\n\n")
    assert all(event.startswith("data: ") for event in reply.text.removesuffix("\n\n").split("\n\n"))


async def test_ids_end_with_the_callers_request_id_or_sixteen_hexadecimal_digits(start) -> None:
    client = start(speed=1000).client
    body = HELLO | {"max_tokens": 1}
    plain = (await client.post("/v1/chat/completions", body)).json()["id"]
    assert plain.startswith("chatcmpl-")
    assert len(bytes.fromhex(plain.removeprefix("chatcmpl-"))) == 8
    named = await client.post("/v1/chat/completions", body, {"X-Request-Id": "my-req-123"})
    assert named.json()["id"] == "chatcmpl-my-req-123"
    assert named.header("x-request-id") is None  # as in the capture chat_xreqid
    completion = await client.post("/v1/completions", {"prompt": "x"}, {"X-Request-Id": "r"})
    assert completion.json()["id"] == "cmpl-r"


async def test_request_id_headers_echo_or_invent_an_id_on_every_answer(start) -> None:
    client = start(speed=1000, enable_request_id_headers=True).client
    named = await client.post("/v1/chat/completions", HELLO | {"max_tokens": 1}, {"X-Request-Id": "rid-9"})
    assert (named.json()["id"], named.header("x-request-id")) == ("chatcmpl-rid-9", "rid-9")
    missing = await client.post("/reset_prefix_cache", {})
    assert missing.status == 404
    assert len(bytes.fromhex(missing.header("x-request-id") or "")) == 16


async def test_usage_counts_cached_and_newly_cached_prompt_tokens(start) -> None:
    client = start(speed=1000).client
    body = {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 3}
    first = (await client.post("/v1/chat/completions", body)).json()["usage"]
    second = (await client.post("/v1/chat/completions", body)).json()["usage"]
    tokens = first["prompt_tokens"]
    assert first["total_tokens"] == tokens + 3
    whole = tokens // 16 * 16
    found = (tokens - 1) // 16 * 16
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["prompt_tokens_details"]["created_cache_tokens"] == whole
    assert second["prompt_tokens_details"]["cached_tokens"] == found
    assert second["prompt_tokens_details"]["created_cache_tokens"] == whole - found


async def test_usage_has_no_details_when_they_are_switched_off(start) -> None:
    client = start(speed=1000, enable_prompt_tokens_details=False).client
    usage = (await client.post("/v1/completions", {"prompt": "x"})).json()["usage"]
    assert usage["prompt_tokens_details"] is None


async def test_a_salt_separates_equal_prompts(start) -> None:
    client = start(speed=1000).client
    cached = []
    for salt in ("a", "b", "a"):
        body = {"prompt": list(range(100, 200)), "max_tokens": 1, "cache_salt": salt}
        usage = (await client.post("/v1/completions", body)).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 0, 96]


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        pytest.param("a", 1, id="text"),
        pytest.param(["a", "b"], 2, id="texts"),
        pytest.param([5, 6, 7], 1, id="ids"),
        pytest.param([[5, 6], [7]], 2, id="lists of ids"),
    ],
)
async def test_a_completion_takes_every_form_of_prompt(start, prompt, answers) -> None:
    client = start(speed=1000).client
    reply = (await client.post("/v1/completions", {"prompt": prompt, "n": 2, "max_tokens": 2})).json()
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * answers))
    assert reply["usage"]["completion_tokens"] == 4 * answers


async def test_prompts_count_once_however_many_answers_they_get(start) -> None:
    client = start(speed=1000).client
    body = {"prompt": [[5] * 40, [6] * 40], "n": 3, "max_tokens": 1}
    usage = (await client.post("/v1/completions", body)).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (80, 6)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_repeats_the_prompt_before_the_answer(start, tokenizer, stream) -> None:
    client = start(speed=1000).client
    for prompt in ("def a", tokenizer.encode("def a")):
        reply = await client.post(
            "/v1/completions", {"prompt": prompt, "max_tokens": 2, "echo": True, "stream": stream}
        )
        pieces = reply.chunks if stream else [reply.json()]
        text = "".join(choice["text"] for piece in pieces for choice in piece["choices"])
        assert text.startswith("def a ")
        assert text.count("def a") == 1


async def test_a_stream_and_a_whole_answer_have_the_same_text(start) -> None:
    client = start(speed=1000).client
    body = {"prompt": WORDS, "max_tokens": 40}
    plain = (await client.post("/v1/completions", body)).json()["choices"][0]["text"]
    streamed = await client.post("/v1/completions", body | {"stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed.chunks) == plain
    assert plain


async def test_the_default_is_sixteen_tokens_for_a_completion_and_the_context_for_a_chat(start) -> None:
    client = start(speed=10_000, max_model_len=64).client
    completion = (await client.post("/v1/completions", {"prompt": "x", "ignore_eos": True})).json()
    assert completion["usage"]["completion_tokens"] == 16
    chat = (await client.post("/v1/chat/completions", HELLO | {"ignore_eos": True})).json()
    assert chat["usage"]["total_tokens"] == 64
    assert chat["choices"][0]["finish_reason"] == "length"


async def test_reset_prefix_cache_needs_dev_mode_and_an_idle_engine(start, capture) -> None:
    assert (await start().client.post("/reset_prefix_cache", {})).json() == {"detail": "Not Found"}
    harness = start(speed=1000, dev_mode=True)
    body = {"prompt": [5] * 40, "max_tokens": 1}
    await harness.client.post("/v1/completions", body)
    assert harness.rank.engine.blocks() != []
    reply = await harness.client.post("/reset_prefix_cache", {})
    assert reply.body.decode() == capture("reset_prefix_cache").body.strip()
    assert harness.rank.engine.blocks() == []


@pytest.mark.looptime
async def test_reset_prefix_cache_is_refused_while_a_request_runs(start) -> None:
    harness = start(dev_mode=True)
    running, _ = harness.client.begin("POST", "/v1/completions", {"prompt": "x", "max_tokens": 50, "ignore_eos": True})
    await asyncio.sleep(0.1)
    assert (await harness.client.post("/reset_prefix_cache", {})).json() == {"success": False}
    await running


async def test_long_texts_are_tokenised_in_a_thread_with_the_same_result(start, tokenizer) -> None:
    client = start(speed=1000, max_model_len=14_000).client
    text = "The quick brown fox. " * 1500
    reply = (await client.post("/tokenize", {"prompt": text})).json()
    assert reply["tokens"] == tokenizer.encode(text)
    usage = (await client.post("/v1/completions", {"prompt": text, "max_tokens": 1})).json()["usage"]
    assert usage["prompt_tokens"] == reply["count"]


async def test_detokenize_is_the_inverse_of_tokenize(start) -> None:
    client = start().client
    tokens = (await client.post("/tokenize", {"prompt": "naïve café 🎉"})).json()["tokens"]
    assert (await client.post("/detokenize", {"tokens": tokens})).json() == {"prompt": "naïve café 🎉"}
