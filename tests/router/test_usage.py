"""What an answer's `usage` is read as: never more and never less than it states, wherever the answer is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.server.answer import AnswerStream, Usage, UsageFinder, read_answer

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
