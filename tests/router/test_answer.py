"""What an answer is read as: the state of a stream, which of its bytes may be passed on, and its `usage`, wherever the
answer is cut.

Not covered: the counts that the router makes of it (test_figures.py), and retries (test_retries.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.latency_samples import Usage
from router.server.answer import MAX_HELD, AnswerStream, StreamState, UsageFinder, complete_events, read_answer

ERROR = b'data: {"error": {"message": "dead", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'


def text(text: str, finish: str | None = None) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish}]}) + b"\n\n"


def chat(delta: dict[str, object], finish: str | None = None) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}) + b"\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


@pytest.mark.parametrize(
    ("held", "state"),
    [
        pytest.param(b"", StreamState.SILENT, id="nothing"),
        pytest.param(b": keep-alive\n\n", StreamState.SILENT, id="comment"),
        pytest.param(ROLE, StreamState.SILENT, id="chat role"),
        pytest.param(text("a")[:-20], StreamState.SILENT, id="half an event"),
        pytest.param(text("a"), StreamState.ANSWERING, id="text"),
        pytest.param(text(""), StreamState.ANSWERING, id="empty text"),
        pytest.param(text("", "stop"), StreamState.ANSWERING, id="empty text, stopped"),
        pytest.param(text("a", "abort"), StreamState.ANSWERING, id="text, aborted"),
        pytest.param(text("", "abort"), StreamState.ABORTED, id="empty text, aborted"),
        pytest.param(ROLE + chat({"content": "a"}), StreamState.ANSWERING, id="chat content"),
        pytest.param(ROLE + chat({"reasoning": "a"}), StreamState.ANSWERING, id="chat reasoning"),
        pytest.param(ROLE + chat({"tool_calls": [{}]}), StreamState.ANSWERING, id="chat tool call"),
        pytest.param(ROLE + chat({"content": ""}, "abort"), StreamState.ABORTED, id="chat aborted"),
        pytest.param(ROLE + chat({}, "stop"), StreamState.ANSWERING, id="chat stopped"),
        pytest.param(ROLE + b"data: [DONE]\n\n", StreamState.REFUSED, id="chat done"),
        pytest.param(ERROR, StreamState.FAILED, id="error 500"),
        pytest.param(ROLE + ERROR, StreamState.FAILED, id="role, then error 500"),
        pytest.param(ERROR.replace(b"500", b"400"), StreamState.REFUSED, id="error 400"),
        pytest.param(b"event: response.created\ndata: {}\n\n", StreamState.ANSWERING, id="type of event only"),
        pytest.param(b"data: not json\n\n", StreamState.ANSWERING, id="not JSON"),
        pytest.param(b"data: 7\n\n", StreamState.ANSWERING, id="no object"),
        pytest.param(ERROR.replace(b"\n", b"\r\n"), StreamState.FAILED, id="error with CRLF"),
        pytest.param(b"x" * (MAX_HELD + 1), StreamState.ANSWERING, id="too long for an event"),
    ],
)
def test_states_of_a_stream(held: bytes, state: StreamState) -> None:
    whole, piecemeal = AnswerStream(), AnswerStream()
    whole.push(held)
    for at in range(len(held)) if len(held) < 1000 else ():
        piecemeal.push(held[at : at + 1])
    assert whole.state is state
    assert len(held) >= 1000 or piecemeal.state is state


@given(st.lists(st.binary()))
def test_no_stream_is_too_strange(pieces: list[bytes]) -> None:
    for prefix in (b"", b"data: ", b": "):
        stream, came, passed = AnswerStream(), b"", b""
        for piece in pieces:
            came += prefix + piece + b"\n\n"
            passed += stream.push(prefix + piece + b"\n\n")
            assert came.startswith(passed)
        assert passed + stream.finish() == came


@given(
    st.lists(st.sampled_from([b"data: a\n\n", b"event: b\ndata: c\n\n", b"data: d\r\n\r\n"])), st.text("xy", max_size=5)
)
def test_events_are_complete_up_to_the_last_empty_line(events: list[bytes], rest: str) -> None:
    whole = b"".join(events)
    assert complete_events(whole + rest.encode()) == len(whole)


@pytest.mark.parametrize(
    ("body", "aborted"),
    [
        pytest.param(b'{"choices":[{"text":"cut","finish_reason":"abort"}]}', True, id="aborted"),
        pytest.param(
            b'{"choices":[{"text":"a","finish_reason":"stop"},{"text":"b","finish_reason":"abort"}]}',
            True,
            id="one of two aborted",
        ),
        pytest.param(b'{"choices":[{"text":"\\"abort\\"","finish_reason":"stop"}]}', False, id="quoted in text"),
        pytest.param(b'{"choices":[{"text":"abort","finish_reason":"length"}]}', False, id="text"),
        pytest.param(b'"abort"', False, id="a string"),
        pytest.param(b'{"abort"', False, id="half an object"),
        pytest.param(b'{"choices":"abort"}', False, id="choices of no list"),
        pytest.param(b"", False, id="nothing"),
    ],
)
def test_aborted_answers(body: bytes, aborted: bool) -> None:
    assert read_answer(body).aborted is aborted


COMMENT = b": keep-alive\n\n"
ONE = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [
        pytest.param([COMMENT, ONE], [COMMENT, ONE], id="comment"),
        pytest.param([b": keep-alive\r\n\r\n", ONE], [b": keep-alive\r\n\r\n", ONE], id="comment with CRLF"),
        pytest.param(
            [b": keep", b"-alive\n", b"\n", ONE], [b"", b": keep-alive\n", b"\n", ONE], id="comment in pieces"
        ),
        pytest.param([b": line\n", ONE], [b": line\n", ONE], id="comment without an empty line"),
        pytest.param([b"\n", ONE], [b"\n", ONE], id="empty line"),
        pytest.param([ROLE, ONE], [b"", ROLE + ONE], id="role"),
        pytest.param([ROLE, COMMENT, ONE], [b"", ROLE + COMMENT, ONE], id="role and comment"),
        pytest.param([ROLE + COMMENT + ROLE, ONE], [ROLE + COMMENT, ROLE + ONE], id="comment between two roles"),
        pytest.param([ONE + ONE[:9], ONE[9:], COMMENT], [ONE, ONE, COMMENT], id="half an event"),
        pytest.param([COMMENT + ONE + ROLE[:30]], [COMMENT + ONE], id="half an event after a whole one"),
    ],
)
def test_comments_go_on_as_they_come_and_events_whole(pieces: list[bytes], passed: list[bytes]) -> None:
    stream = AnswerStream()
    assert [stream.push(piece) for piece in pieces] == passed


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(COMMENT, id="comment"),
        pytest.param(ROLE, id="role"),
        pytest.param(COMMENT * 50 + ROLE, id="comments and a role"),
        pytest.param(b"\n\n", id="empty lines"),
        pytest.param(b"id: 7\n\n", id="id"),
        pytest.param(b"retry: 10\n\n", id="retry"),
    ],
)
def test_only_data_with_content_is_a_first_token(before: bytes) -> None:
    stream = AnswerStream()
    stream.push(before)
    assert stream.state is StreamState.SILENT
    stream.push(ONE)
    assert stream.state is StreamState.ANSWERING


def test_a_failure_within_a_stream_is_seen() -> None:
    stream = AnswerStream()
    for piece in (ONE, ROLE, ERROR):
        assert stream.push(piece) == piece
    assert stream.state is StreamState.FAILED


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        pytest.param("response.created", StreamState.SILENT, id="response.created"),
        pytest.param("response.in_progress", StreamState.SILENT, id="response.in_progress"),
        pytest.param("response.output_text.delta", StreamState.ANSWERING, id="response.output_text.delta"),
        pytest.param("message_start", StreamState.SILENT, id="message_start"),
        pytest.param("ping", StreamState.SILENT, id="ping"),
        pytest.param("content_block_delta", StreamState.ANSWERING, id="content_block_delta"),
    ],
)
def test_events_of_other_apis(kind: str, state: StreamState) -> None:
    stream = AnswerStream()
    stream.push(b'event: %s\ndata: {"type":"%s"}\n\n' % (kind.encode(), kind.encode()))
    assert stream.state is state


MESSAGE = {"type": "message", "content": [{"type": "text", "text": ""}], "usage": {"input_tokens": 9}}


def ended(tokens: int) -> dict[str, Any]:
    return {"object": "response", "status": "completed", "output": [], "usage": {"output_tokens": tokens}}


@pytest.mark.parametrize(
    ("last", "state"),
    [
        pytest.param({"type": "message_delta", "delta": {"stop_reason": None}}, StreamState.ABORTED, id="messages"),
        pytest.param(
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 0}},
            StreamState.ABORTED,
            id="messages, no token",
        ),
        pytest.param(
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, StreamState.ANSWERING, id="messages, empty"
        ),
        pytest.param({"type": "response.completed", "response": ended(0)}, StreamState.ABORTED, id="responses"),
        pytest.param(
            {"type": "response.completed", "response": ended(1)}, StreamState.ANSWERING, id="responses, ended"
        ),
    ],
)
def test_a_stream_of_another_api_that_is_aborted_before_its_first_token(
    last: dict[str, Any], state: StreamState
) -> None:
    stream = AnswerStream()
    stream.push(event(type="message_start") + event(**last))
    assert stream.state is state


@pytest.mark.parametrize(
    ("body", "aborted"),
    [
        pytest.param(MESSAGE, True, id="message"),
        pytest.param(MESSAGE | {"stop_reason": "end_turn"}, False, id="message, complete"),
        pytest.param(ended(0), True, id="response"),
        pytest.param(ended(1), False, id="response, complete"),
        pytest.param(ended(0) | {"status": "queued", "usage": None}, False, id="response, in the background"),
        pytest.param({"object": "list", "data": [], "usage": {"prompt_tokens": 2}}, False, id="embedding"),
    ],
)
def test_a_whole_answer_of_another_api_that_is_aborted(body: dict[str, Any], aborted: bool) -> None:
    assert read_answer(orjson.dumps(body)).aborted is aborted


# --- usage ---


CAPTURES = Path(__file__).parents[1] / "data/vllm"
MISLEADING = 'the model said {"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":9}}} \n\ndata: x'


def details(cached: int | None) -> dict[str, Any]:
    return {"prompt_tokens_details": {"cached_tokens": cached, "created_cache_tokens": 3}}


@pytest.mark.parametrize(
    ("stated", "read"),
    [
        pytest.param({"prompt_tokens": 60, "completion_tokens": 4, **details(48)}, Usage(60, 4, 48), id="cached"),
        pytest.param({"prompt_tokens": 60, "completion_tokens": 4, **details(0)}, Usage(60, 4, 0), id="none cached"),
        pytest.param(
            {"prompt_tokens": 60, "completion_tokens": 4, **details(None)}, Usage(60, 4, None), id="cached is null"
        ),
        pytest.param(
            {"prompt_tokens": 60, "completion_tokens": 0, "prompt_tokens_details": None},
            Usage(60, 0, None),
            id="no details",
        ),
        pytest.param({"prompt_tokens": 60}, Usage(60, None, None), id="prompt only"),
        pytest.param({"prompt_tokens": 60, **details(61)}, Usage(60, None, None), id="more cached than prompt"),
        pytest.param({"prompt_tokens": 60, **details(-1)}, Usage(60, None, None), id="negative"),
        pytest.param(
            {"prompt_tokens": 60, "prompt_tokens_details": {"cached_tokens": 1.5}}, Usage(60, None, None), id="fraction"
        ),
        pytest.param(
            {"prompt_tokens": 60, "prompt_tokens_details": {"cached_tokens": True}}, Usage(60, None, None), id="boolean"
        ),
        pytest.param(
            {"input_tokens": 60, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 16}},
            Usage(60, 2, 16),
            id="Responses API",
        ),
        pytest.param(
            {"input_tokens": 6, "output_tokens": 2, "cache_read_input_tokens": 32}, Usage(38, 2, 32), id="Messages API"
        ),
        pytest.param(
            {"input_tokens": 6, "output_tokens": 2, "cache_creation_input_tokens": 32, "cache_read_input_tokens": 0},
            Usage(38, 2, 0),
            id="Messages API, written and not read",
        ),
        pytest.param(
            {"input_tokens": 38, "output_tokens": 2, "cache_creation_input_tokens": 16},
            Usage(54, 2, None),
            id="Messages API, written",
        ),
        pytest.param(
            {"input_tokens": 38, "output_tokens": 2, "cache_read_input_tokens": None},
            Usage(38, 2, None),
            id="Messages API, read is null",
        ),
        pytest.param(details(48), None, id="no prompt"),
        pytest.param({}, None, id="empty"),
        pytest.param(None, None, id="null"),
        pytest.param([], None, id="list"),
        pytest.param(7, None, id="number"),
    ],
)
def test_what_a_usage_states(stated: Any, read: Usage | None) -> None:
    body = orjson.dumps({"choices": [{"text": MISLEADING}], "usage": stated, "kv_transfer_params": None})
    assert read_answer(body).usage == read
    finder = UsageFinder()
    for at in range(0, len(body), 7):
        finder.push(body[at : at + 7])
    assert finder.usage == read
    stream = AnswerStream()
    stream.push(
        event(choices=[{"index": 0, "text": MISLEADING}]) + event(choices=[], usage=stated) + b"data: [DONE]\n\n"
    )
    assert stream.usage == read


def test_a_messages_answer_of_a_running_vllm_tells_its_whole_prompt() -> None:
    """38 tokens, 32 of them cached: `input_tokens` says 6, a stream's first event 38 and nothing of a cache."""
    whole, stream = (CAPTURES / name for name in ("messages_cached.txt", "messages_stream_cached.txt"))
    assert read_answer(whole.read_bytes().partition(b"\r\n\r\n")[2]).usage == Usage(38, 2, 32)
    answer = AnswerStream()
    answer.push(stream.read_bytes().partition(b"\r\n\r\n")[2])
    assert answer.usage == Usage(38, 2, 32)


def test_the_usage_of_a_response_is_in_the_event_that_ends_its_stream() -> None:
    usage = {"input_tokens": 60, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 48}}
    stream = AnswerStream()
    stream.push(event(type="response.created", response={"usage": None}) + event(type="response.output_text.delta"))
    stream.push(event(type="response.completed", response={"usage": usage}))
    assert stream.usage == Usage(60, 2, 48)


USAGE = st.none() | st.fixed_dictionaries(
    {"prompt_tokens": st.integers(100, 5000), "completion_tokens": st.integers(0, 500)},
    optional={
        "prompt_tokens_details": st.none() | st.fixed_dictionaries({"cached_tokens": st.none() | st.integers(0, 100)})
    },
)


@given(
    st.lists(st.tuples(st.text() | st.just(MISLEADING), USAGE, st.booleans()), min_size=1, max_size=6),
    st.lists(st.integers(1, 40), min_size=1),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_the_last_usage_of_a_stream_counts_wherever_it_is_cut(
    chunks: list[tuple[str, dict[str, Any] | None, bool]], sizes: list[int], line: bytes
) -> None:
    """Intermediate chunks state usages of their own (`continuous_usage_stats`), and comments may stand anywhere."""
    data, last = b"", None
    for text, usage, comment in chunks:
        data += b': "usage":{"prompt_tokens":1}' + line * 2 if comment else b""
        data += b"data: " + orjson.dumps({"choices": [{"index": 0, "text": text}], "usage": usage}) + line * 2
        last = usage if usage is not None else last
    stream, passed, at, turn = AnswerStream(), b"", 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        passed += stream.push(data[at : at + size])
        at, turn = at + size, turn + 1
    assert passed + stream.finish() == data
    if last is None:
        assert stream.usage is None
    else:
        cached = (last.get("prompt_tokens_details") or {}).get("cached_tokens")
        assert stream.usage == Usage(last["prompt_tokens"], last["completion_tokens"], cached)


@given(st.binary(), st.binary())
def test_nothing_is_too_strange(before: bytes, after: bytes) -> None:
    finder = UsageFinder()
    for piece in (before, b'"usage":{', after, b"}"):
        finder.push(piece)
    read_answer(before + b'"usage"' + after)
