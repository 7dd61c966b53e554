"""What an answer is read as: the state of a stream, which of its bytes may be passed on, and its `usage`, wherever the
answer is cut. The counts that the router makes of it are in test_figures.py, the retries in test_retries.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.server.answer import MAX_HELD, AnswerStream, StreamState, Usage, UsageFinder, complete_events, read_answer

ERROR = b'data: {"error": {"message": "dead", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("held", "state"),
    [
        (b"", StreamState.SILENT),
        (b": keep-alive\n\n", StreamState.SILENT),
        (ROLE, StreamState.SILENT),
        (b'data: {"choices":[{"index":0,"text":"a"', StreamState.SILENT),
        (b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n', StreamState.ANSWERING),
        (b'data: {"choices":[{"index":0,"text":"","finish_reason":null}]}\n\n', StreamState.ANSWERING),
        (b'data: {"choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n', StreamState.ANSWERING),
        (b'data: {"choices":[{"index":0,"text":"a","finish_reason":"abort"}]}\n\n', StreamState.ANSWERING),
        (b'data: {"choices":[{"index":0,"text":"","finish_reason":"abort"}]}\n\n', StreamState.ABORTED),
        (
            ROLE + b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n',
            StreamState.ANSWERING,
        ),
        (
            ROLE + b'data: {"choices":[{"index":0,"delta":{"reasoning":"a"},"finish_reason":null}]}\n\n',
            StreamState.ANSWERING,
        ),
        (
            ROLE + b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{}]},"finish_reason":null}]}\n\n',
            StreamState.ANSWERING,
        ),
        (
            ROLE + b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"abort"}]}\n\n',
            StreamState.ABORTED,
        ),
        (ROLE + b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n', StreamState.ANSWERING),
        (ROLE + b"data: [DONE]\n\n", StreamState.REFUSED),
        (ERROR, StreamState.FAILED),
        (ROLE + ERROR, StreamState.FAILED),
        (ERROR.replace(b"500", b"400"), StreamState.REFUSED),
        (b"event: response.created\ndata: {}\n\n", StreamState.ANSWERING),
        (b"data: not json\n\n", StreamState.ANSWERING),
        (b"data: 7\n\n", StreamState.ANSWERING),
        (ERROR.replace(b"\n", b"\r\n"), StreamState.FAILED),
        (b"x" * (MAX_HELD + 1), StreamState.ANSWERING),
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
        (b'{"choices":[{"text":"cut","finish_reason":"abort"}]}', True),
        (b'{"choices":[{"text":"a","finish_reason":"stop"},{"text":"b","finish_reason":"abort"}]}', True),
        (b'{"choices":[{"text":"\\"abort\\"","finish_reason":"stop"}]}', False),
        (b'{"choices":[{"text":"abort","finish_reason":"length"}]}', False),
        (b'"abort"', False),
        (b'{"abort"', False),
        (b'{"choices":"abort"}', False),
        (b"", False),
    ],
)
def test_aborted_answers(body: bytes, aborted: bool) -> None:
    assert read_answer(body).aborted is aborted


COMMENT = b": keep-alive\n\n"
ONE = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [
        ([COMMENT, ONE], [COMMENT, ONE]),
        ([b": keep-alive\r\n\r\n", ONE], [b": keep-alive\r\n\r\n", ONE]),
        ([b": keep", b"-alive\n", b"\n", ONE], [b"", b": keep-alive\n", b"\n", ONE]),
        ([b": line\n", ONE], [b": line\n", ONE]),
        ([b"\n", ONE], [b"\n", ONE]),
        ([ROLE, ONE], [b"", ROLE + ONE]),
        ([ROLE, COMMENT, ONE], [b"", ROLE + COMMENT, ONE]),
        ([ROLE + COMMENT + ROLE, ONE], [ROLE + COMMENT, ROLE + ONE]),
        ([ONE + ONE[:9], ONE[9:], COMMENT], [ONE, ONE, COMMENT]),
        ([COMMENT + ONE + ROLE[:30]], [COMMENT + ONE]),
    ],
)
def test_comments_go_on_as_they_come_and_events_whole(pieces: list[bytes], passed: list[bytes]) -> None:
    stream = AnswerStream()
    assert [stream.push(piece) for piece in pieces] == passed


@pytest.mark.parametrize("before", [b"", COMMENT, ROLE, COMMENT * 50 + ROLE, b"\n\n", b"id: 7\n\n", b"retry: 10\n\n"])
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
        ("response.created", StreamState.SILENT),
        ("response.in_progress", StreamState.SILENT),
        ("response.output_text.delta", StreamState.ANSWERING),
        ("message_start", StreamState.SILENT),
        ("ping", StreamState.SILENT),
        ("content_block_delta", StreamState.ANSWERING),
    ],
)
def test_events_of_other_apis(kind: str, state: StreamState) -> None:
    stream = AnswerStream()
    stream.push(b'event: %s\ndata: {"type":"%s"}\n\n' % (kind.encode(), kind.encode()))
    assert stream.state is state


# --- usage ---


CAPTURES = Path(__file__).parents[1] / "data/vllm"
MISLEADING = 'the model said {"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":9}}} \n\ndata: x'


def event(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


def details(cached: int | None) -> dict[str, Any]:
    return {"prompt_tokens_details": {"cached_tokens": cached, "created_cache_tokens": 3}}


@pytest.mark.parametrize(
    ("stated", "read"),
    [
        ({"prompt_tokens": 60, "completion_tokens": 4, **details(48)}, Usage(60, 4, 48)),
        ({"prompt_tokens": 60, "completion_tokens": 4, **details(0)}, Usage(60, 4, 0)),
        ({"prompt_tokens": 60, "completion_tokens": 4, **details(None)}, Usage(60, 4, None)),
        ({"prompt_tokens": 60, "completion_tokens": 0, "prompt_tokens_details": None}, Usage(60, 0, None)),
        ({"prompt_tokens": 60}, Usage(60, None, None)),
        ({"prompt_tokens": 60, **details(61)}, Usage(60, None, None)),
        ({"prompt_tokens": 60, **details(-1)}, Usage(60, None, None)),
        ({"prompt_tokens": 60, "prompt_tokens_details": {"cached_tokens": 1.5}}, Usage(60, None, None)),
        ({"prompt_tokens": 60, "prompt_tokens_details": {"cached_tokens": True}}, Usage(60, None, None)),
        ({"input_tokens": 60, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 16}}, Usage(60, 2, 16)),
        ({"input_tokens": 6, "output_tokens": 2, "cache_read_input_tokens": 32}, Usage(38, 2, 32)),
        (
            {"input_tokens": 6, "output_tokens": 2, "cache_creation_input_tokens": 32, "cache_read_input_tokens": 0},
            Usage(38, 2, 0),
        ),
        ({"input_tokens": 38, "output_tokens": 2, "cache_creation_input_tokens": 16}, Usage(54, 2, None)),
        ({"input_tokens": 38, "output_tokens": 2, "cache_read_input_tokens": None}, Usage(38, 2, None)),
        (details(48), None),
        ({}, None),
        (None, None),
        ([], None),
        (7, None),
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
