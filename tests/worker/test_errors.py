"""Requests that cannot be served are refused with vLLM's errors, and leave nothing behind.

Not covered: every field's bounds (`pairs`), and validation without a server (`test_protocol.py`).
"""

from __future__ import annotations

import json

import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def message(reply) -> str:
    return reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "name",
    [
        "err_404", "err_405", "err_bad_role", "err_empty_ids", "err_empty_prompt", "err_invalid_json",
        "err_missing_messages", "err_missing_prompt", "err_neg_max_tokens", "err_neg_max_tokens_chat",
        "err_stream_wrong_model", "err_too_long_with_max", "err_wrong_model", "err_wrong_model_completions",
        "err_zero_max_tokens", "err_zero_max_tokens_chat",
    ],
)  # fmt: skip
async def test_an_error_is_vllms_to_the_byte(name, start, capture) -> None:
    real = capture(name)
    harness = start()
    reply = await harness.client.request(real.method, real.path, real.request)
    assert (reply.status, reply.text) == (real.status, real.body.rstrip("\n"))
    own = [(name, value) for name, value in real.headers if name not in ("date", "server")]
    assert sorted(reply.headers) == sorted(own)
    assert harness.rank.engine.load().free_blocks == 924
    assert harness.worker.service.in_progress == 0


async def test_a_body_that_is_not_declared_as_json_is_refused(start, capture) -> None:
    real = capture("err_content_type")
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/xml; charset=utf-8", ""):
        reply = await start().client.post(COMPLETIONS, {"prompt": "x"}, {"content-type": kind})
        assert (reply.status, reply.text) == (real.status, real.body.rstrip("\n"))
    charset = await start(speed=1000).client.post(
        COMPLETIONS, {"prompt": "x"}, {"content-type": "Application/JSON; charset=utf-8"}
    )
    assert charset.status == 200


async def test_a_prompt_longer_than_the_context(start, capture) -> None:
    client = start().client
    ids = await client.post(COMPLETIONS, {"prompt": [5] * 2100})
    assert json.loads(ids.text) == json.loads(capture("err_too_long").body)
    text = await client.post(CHAT, {"messages": [{"role": "user", "content": "file " * 3000}]})
    assert json.loads(text.text) == json.loads(capture("err_chat_too_long_text").body)


async def test_an_answer_gets_what_the_prompt_leaves_of_the_context(start) -> None:
    client = start(speed=1000, mean_output_tokens=100_000).client
    fits = await client.post(COMPLETIONS, {"prompt": [5] * 2040, "max_tokens": 9})
    assert (fits.status, fits.json()["usage"]["completion_tokens"]) == (200, 8)
    full = await client.post(COMPLETIONS, {"prompt": [5] * 2048, "max_tokens": 9})
    assert (full.status, full.json()["error"]["param"]) == (400, "max_tokens")


async def test_more_output_than_the_context(start, capture) -> None:
    client = start(max_model_len=512).client
    reply = await client.post(COMPLETIONS, {"prompt": "x y", "max_tokens": 600})
    assert reply.text == capture("err_kv_too_small").body.rstrip("\n")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": 7}),
        (COMPLETIONS, {"prompt": {"a": 1}}),
        (COMPLETIONS, {"prompt": [[]]}),
        (COMPLETIONS, {"prompt": [1, "a"]}),
        (COMPLETIONS, {"prompt": [-1]}),
        (COMPLETIONS, {"prompt": [10**30]}),
        (COMPLETIONS, {"prompt": [50257]}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "many"}),
        (COMPLETIONS, {"prompt": "x", "n": 0}),
        (COMPLETIONS, {"prompt": "x", "n": 1_000_000}),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}),
        (COMPLETIONS, {"prompt": "x", "stop": 5}),
        (COMPLETIONS, {"prompt": "x", "stream": "perhaps"}),
        (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}),
        (COMPLETIONS, {"prompt": "x", "min_tokens": 17}),
        (COMPLETIONS, {"prompt": "x", "min_tokens": -1}),
        (COMPLETIONS, {"prompt": "x", "cache_salt": ""}),
        (COMPLETIONS, {"prompt": "x", "cache_salt": 5}),
        (COMPLETIONS, [1, 2]),
        (COMPLETIONS, None),
        (CHAT, {"messages": "hello"}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**64]}),
    ],
    ids=str,
)
async def test_bad_values_are_refused_with_an_error_object(path, body, start) -> None:
    harness = start()
    reply = await harness.client.post(path, body)
    assert reply.status == 400
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == 400
    assert error["message"]
    assert harness.rank.async_engine.active == 0


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b'{"prompt": "\xc3\x28"}', id="bad UTF-8"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"prompt": "\\ud800"}', id="half surrogate"),
        pytest.param(b'{"model": "\\ud800", "prompt": "x"}', id="half surrogate as model"),
    ],
)
async def test_bodies_that_are_no_proper_json(raw, start) -> None:
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        reply = await start().client.post(path, raw)
        assert reply.status in (400, 404)
        answer = reply.json()
        assert "detail" in answer or list(answer["error"]) == ["message", "type", "param", "code"]


async def test_invalid_utf8_is_answered_as_by_fastapi(start) -> None:
    reply = await start().client.post(COMPLETIONS, b'{"prompt": "\xff"}')
    assert (reply.status, reply.json()) == (400, {"detail": "There was an error parsing the body"})


async def test_unknown_models_are_404_on_every_endpoint(start) -> None:
    client = start().client
    for path, body in (
        ("/tokenize", {"model": "nope", "prompt": "x"}),
        ("/detokenize", {"model": "nope", "tokens": [1]}),
    ):
        reply = await client.post(path, body)
        assert (reply.status, reply.json()["error"]["type"]) == (404, "NotFoundError")


async def test_error_messages_never_echo_a_whole_body(start) -> None:
    secret = "s" * 5000
    reply = await start().client.post(COMPLETIONS, {"prompt": {"secret": secret}, "max_tokens": [secret] * 50})
    assert reply.status == 400
    assert secret not in reply.text
