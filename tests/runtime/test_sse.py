"""Reading server-sent events.

Covers: that a stream gives the same events however it is cut, in LF or CRLF; comments, unknown fields, the size limit.
Not covered: what events mean; the tests of those who read answers (tests/router/test_answer.py,
tests/bench/test_loadgen.py) and feeds (tests/router/test_feed.py) do.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sse import EventTooLargeError, SseEvent, SseReader, complete_events, first_event

LINE = st.binary(max_size=50).filter(lambda line: not {*b"\r\n"} & {*line})


@given(
    st.lists(st.tuples(st.sampled_from(["batch", "load"]), LINE)),
    st.lists(st.integers(0, 2000)),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_events_are_the_same_however_the_stream_is_cut(
    events: list[tuple[str, bytes]], cuts: list[int], end_of_line: bytes
) -> None:
    stream = b"".join(b"id: 1:2\nevent: %s\ndata: %s\n\n" % (name.encode(), data) for name, data in events)
    stream = stream.replace(b"\n", end_of_line)
    reader, found, start = SseReader(1000), [], 0
    for end in [*sorted(min(cut, len(stream)) for cut in cuts), len(stream)]:
        found += reader.feed(stream[start:end])
        start = end
    assert found == [SseEvent(name, data) for name, data in events]


def test_comments_and_unknown_fields_are_skipped() -> None:
    assert SseReader(100).feed(b": hello\n\nretry: 5\n\ndata: a\ndata:b\n\n") == [SseEvent("message", b"a\nb")]


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(b"data: " + b"x" * 200, id="unfinished"),
        pytest.param(b"data: " + b"x" * 200 + b"\n\n", id="whole"),
    ],
)
def test_an_event_larger_than_the_limit_is_an_error(piece: bytes) -> None:
    with pytest.raises(EventTooLargeError, match="100 bytes"):
        SseReader(100).feed(piece)


@pytest.mark.parametrize("end", [pytest.param(b"\n\n", id="LF"), pytest.param(b"\r\n\r\n", id="CRLF")])
def test_how_much_of_a_stream_is_whole_events(end: bytes) -> None:
    first, second = b"data: one" + end, b"data: two" + end
    assert complete_events(first + second + b"data: th") == len(first + second)
    assert complete_events(b"data: one") == 0
    assert first_event(first + second, 0) == len(first)
    assert first_event(first + second, len(first)) == len(second)
    assert first_event(first + b"data: tw", len(first)) == 0
