"""Validation of requests, and errors that equal vLLM 0.32's to the byte where a capture shows them.

Not covered: the checks that need a tokenizer or the context (`test_errors.py`), and every field's bounds (`pairs`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import errors
from kvcache.errors import SSE_DONE, ApiError, sse_error
from worker.emulator.protocol.chat import ChatCompletionRequest
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.protocol.tokenize import TOKENIZE_REQUEST, DetokenizeRequest
from worker.emulator.protocol.validation import parse_json, parse_request, unsupported_media_type

CAPTURES = Path(__file__).parents[1] / "data" / "vllm"
MODELS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest}


def capture(name: str) -> tuple[str, str, int, str]:
    """Path, request body, status and response body of a captured request."""
    head, answer = (CAPTURES / name).read_text().split("\n\n", 1)
    found = re.search(r"(?:### POST (\S+)\n### body: (.*)\n)?HTTP/1.1 (\d+)", head)
    assert found is not None
    return found[1] or "", found[2] or "", int(found[3]), answer.strip().removesuffix("curl rc 0")


def compact(error: ApiError) -> str:
    return json.dumps(error.body(), separators=(",", ":"))


def refusal(model: Any, raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse_request(model, raw)
    return refused.value


def answered(model: Any, raw: bytes) -> ApiError | None:
    """The error a body is answered with, if any."""
    try:
        parse_request(model, raw)
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize(
    "name",
    [
        "err_bad_role.txt",
        "err_invalid_json.txt",
        "err_missing_messages.txt",
        "err_empty_prompt.txt",
        "err_missing_prompt.txt",
    ],
)
def test_a_bad_body_is_refused_with_vllms_error(name: str) -> None:
    path, body, status, answer = capture(name)
    error = refusal(MODELS[path], body.encode())
    assert (error.status, compact(error)) == (status, answer)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param("err_wrong_model.txt", lambda: errors.model_not_found("nope", ["tiny-llama"]), id="model"),
        pytest.param(
            "err_wrong_model_completions.txt",
            lambda: errors.model_not_found("nope", ["tiny-llama"]),
            id="model of a completion",
        ),
        pytest.param(
            "err_stream_wrong_model.txt", lambda: errors.model_not_found("nope", ["tiny-llama"]), id="model of a stream"
        ),
        pytest.param("err_content_type.txt", unsupported_media_type, id="content type"),
        pytest.param("engine_death_nonstream.txt", errors.engine_dead, id="dead engine"),
    ],
)
def test_errors_of_the_server_are_vllms(name: str, error: Callable[[], ApiError]) -> None:
    _, _, status, answer = capture(name)
    assert (error().status, compact(error())) == (status, answer)


def test_the_end_of_a_stream_whose_engine_died() -> None:
    sent = (CAPTURES / "engine_death_stream_end.txt").read_bytes()
    assert sse_error(errors.engine_dead().body()) + SSE_DONE == sent


@pytest.mark.parametrize("name", ["err_missing_model.txt", "err_unknown_field.txt"])
def test_what_vllm_accepts_is_accepted(name: str) -> None:
    path, body, status, _ = capture(name)
    assert status == 200
    assert parse_request(MODELS[path], body.encode()).max_tokens == 1


def test_a_completion_request_has_vllms_defaults() -> None:
    request = parse_request(CompletionRequest, b'{"prompt": "x"}')
    assert (request.max_tokens, request.min_tokens, request.n, request.stream) == (16, 0, 1, False)
    assert (request.stop, request.stream_options, request.ignore_eos) == ([], None, False)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("x", id="text"),
        pytest.param(["x", "y"], id="texts"),
        pytest.param([1, 2], id="ids"),
        pytest.param([[1], [2, 3]], id="lists of ids"),
    ],
)
def test_every_form_of_a_prompt_is_read(prompt: object) -> None:
    assert parse_request(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompt


def test_a_stream_reports_its_usage_only_when_asked() -> None:
    body = {"prompt": "x", "stream": True, "stream_options": {"continuous_usage_stats": True}}
    options = parse_request(CompletionRequest, json.dumps(body).encode()).stream_options
    assert options is not None
    assert (options.include_usage, options.continuous_usage_stats) == (False, True)


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"max_tokens": 3}, 3, id="older name"),
        pytest.param({"max_completion_tokens": 4}, 4, id="newer name"),
        pytest.param({"max_tokens": 3, "max_completion_tokens": 4}, 4, id="both"),
    ],
)
def test_the_newer_name_of_the_output_limit_overrides_the_older(body: dict[str, int], limit: int | None) -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": "x"}], **body}).encode()
    assert parse_request(ChatCompletionRequest, raw).output_limit == limit


@pytest.mark.parametrize(
    "message",
    [
        pytest.param({"role": "user", "content": "x", "extra": {"kept": True}}, id="unknown field"),
        pytest.param({"role": "user", "content": [{"type": "text", "text": "x"}]}, id="parts"),
        pytest.param({"role": "assistant", "content": None, "tool_calls": []}, id="no tool calls"),
        pytest.param({"role": "assistant"}, id="no content"),
        pytest.param({"role": "tool", "content": "x", "tool_call_id": "1", "extra": 5}, id="tool"),
        pytest.param({"role": "function", "content": None, "name": "f"}, id="function"),
        pytest.param({"role": "wizard", "content": "x"}, id="unknown role"),
    ],
)
def test_messages_are_kept_as_they_came(message: dict[str, Any]) -> None:
    request = parse_request(ChatCompletionRequest, json.dumps({"messages": [message]}).encode())
    assert request.messages == [message]


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        pytest.param(CompletionRequest, {"prompt": 5}, "body.prompt", id="prompt"),
        pytest.param(CompletionRequest, {"prompt": "x", "max_tokens": "many"}, "body.max_tokens", id="max_tokens"),
        pytest.param(CompletionRequest, {"prompt": "x", "stream": "perhaps"}, "body.stream", id="stream"),
        pytest.param(CompletionRequest, {"prompt": "x", "n": None}, "body.n", id="n"),
        pytest.param(CompletionRequest, {"prompt": "x", "stop": ["a"] * 5}, "body.stop", id="stop"),
        pytest.param(CompletionRequest, {"prompt": "x", "priority": 2**63}, "body.priority", id="priority"),
        pytest.param(
            CompletionRequest, {"prompt": "x", "stream_interval": 0}, "body.stream_interval", id="stream_interval"
        ),
        pytest.param(CompletionRequest, {"prompt": "x", "logprobs": "2"}, "logprobs", id="logprobs"),
        pytest.param(CompletionRequest, {"prompt": "x", "cache_salt": ""}, "cache_salt", id="cache_salt"),
        pytest.param(
            CompletionRequest,
            {"prompt": "x", "stream_options": {"include_usage": True}},
            "stream_options",
            id="stream_options",
        ),
        pytest.param(CompletionRequest, {"prompt": "x", "seed": 2**64}, "body.seed", id="seed"),
        pytest.param(CompletionRequest, [1], "body", id="list as body"),
        pytest.param(CompletionRequest, "x", "body", id="text as body"),
        pytest.param(CompletionRequest, None, "body", id="null as body"),
        pytest.param(ChatCompletionRequest, {"messages": "x"}, "body.messages", id="messages"),
        pytest.param(
            ChatCompletionRequest,
            {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
            "top_logprobs",
            id="top_logprobs",
        ),
        pytest.param(TOKENIZE_REQUEST, {}, "body.prompt", id="tokenize"),
        pytest.param(DetokenizeRequest, {"tokens": ["x"]}, "body.tokens.0", id="detokenize"),
    ],
)
def test_wrong_types_and_values_are_named(model: Any, body: object, param: str) -> None:
    error = refusal(model, json.dumps(body).encode())
    assert (error.status, error.param) == (400, param)


def test_no_body_at_all() -> None:
    assert refusal(CompletionRequest, b"").param == "body"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\xffx", id="no UTF-8"),
        pytest.param(b'{"prompt": "\xff"}', id="no UTF-8 in a string"),
        pytest.param(b"[" * 100_000, id="nesting"),
    ],
)
def test_what_no_parser_takes_is_refused_without_a_position(raw: bytes) -> None:
    error = refusal(CompletionRequest, raw)
    assert (error.status, error.param, error.message) == (400, None, "There was an error parsing the body")


def test_what_only_pythons_parser_takes_passes() -> None:
    assert parse_json(b'["\\ud800"]') == ["\ud800"]
    assert parse_json(b"[-Infinity]") == [float("-inf")]


def test_every_error_can_be_encoded() -> None:
    error = errors.model_not_found("\ud800", ["m"])
    assert "\\ud800" in json.dumps(error.body(), ensure_ascii=False).encode().decode()


def test_an_error_never_echoes_a_body() -> None:
    secret = "secret " * 1000
    body = {"prompt": {"a": secret}, "max_tokens": secret, "stop": {"b": [secret]}}
    message = refusal(CompletionRequest, json.dumps(body).encode()).message
    assert len(message) < 4000
    assert message.count("secret") < 40


@given(st.binary(max_size=60))
def test_noise_is_refused_with_an_answer(raw: bytes) -> None:
    for model in (CompletionRequest, ChatCompletionRequest, TOKENIZE_REQUEST, DetokenizeRequest):
        error = answered(model, raw)
        assert error is None or compact(error)


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from([CompletionRequest, ChatCompletionRequest]),
    st.dictionaries(st.sampled_from([*CompletionRequest.model_fields, "messages"]), json_value, max_size=4),
)
def test_any_value_in_any_field_is_read_or_refused(model: Any, body: dict[str, Any]) -> None:
    error = answered(model, json.dumps(body).encode())
    assert error is None or (error.status in (400, 500) and json.loads(compact(error)) == error.body())
