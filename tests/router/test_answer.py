"""What the beginning of an answer says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.server.answer import MAX_HELD, AnswerStream, StreamState, complete_events, read_answer

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
