"""What the beginning of an answer says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.server.answer import MAX_HELD, Verdict, cached_tokens, complete_events, judge_stream, was_aborted

ERROR = b'data: {"error": {"message": "dead", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("held", "verdict"),
    [
        (b"", Verdict.WAIT),
        (b": keep-alive\n\n", Verdict.WAIT),
        (ROLE, Verdict.WAIT),
        (b'data: {"choices":[{"index":0,"text":"a"', Verdict.WAIT),
        (b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n', Verdict.PASS),
        (b'data: {"choices":[{"index":0,"text":"","finish_reason":null}]}\n\n', Verdict.PASS),
        (b'data: {"choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n', Verdict.PASS),
        (b'data: {"choices":[{"index":0,"text":"a","finish_reason":"abort"}]}\n\n', Verdict.PASS),
        (b'data: {"choices":[{"index":0,"text":"","finish_reason":"abort"}]}\n\n', Verdict.ABORT),
        (ROLE + b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n', Verdict.PASS),
        (ROLE + b'data: {"choices":[{"index":0,"delta":{"reasoning":"a"},"finish_reason":null}]}\n\n', Verdict.PASS),
        (ROLE + b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{}]},"finish_reason":null}]}\n\n', Verdict.PASS),
        (ROLE + b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"abort"}]}\n\n', Verdict.ABORT),
        (ROLE + b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n', Verdict.PASS),
        (ROLE + b"data: [DONE]\n\n", Verdict.PASS),
        (ERROR, Verdict.ERROR),
        (ROLE + ERROR, Verdict.ERROR),
        (ERROR.replace(b"500", b"400"), Verdict.PASS),
        (b"event: response.created\ndata: {}\n\n", Verdict.PASS),
        (b"data: not json\n\n", Verdict.PASS),
        (b"data: 7\n\n", Verdict.PASS),
        (ERROR.replace(b"\n", b"\r\n"), Verdict.ERROR),
        (b"x" * (MAX_HELD + 1), Verdict.PASS),
    ],
)
def test_verdicts(held: bytes, verdict: Verdict) -> None:
    assert judge_stream(held) is verdict


@given(st.binary())
def test_no_beginning_of_a_stream_is_too_strange(held: bytes) -> None:
    judge_stream(held)
    judge_stream(b"data: " + held + b"\n\n")


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
    assert was_aborted(body) is aborted


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"usage":{"prompt_tokens_details":{"cached_tokens":48,"created":0}}}', 48),
        (b'{"usage":{"prompt_tokens_details":{"cached_tokens": 48 }}}', 48),
        (b'..."cached_tokens":16},...,"cached_tokens":32}', 32),
        (b'{"usage":{"prompt_tokens_details":{"cached_tokens":null}}}', None),
        (b'{"prompt_tokens_details":null}', None),
        (b'"cached_tokens":', None),
    ],
)
def test_cached_tokens(data: bytes, expected: int | None) -> None:
    assert cached_tokens(data) == expected
