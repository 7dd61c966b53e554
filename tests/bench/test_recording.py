"""Traces of hashed blocks: from lines of an access log to a trace that is replayed, without text, renumbered, in order
of arrival; what is left out; the command with files.

Not covered: the lines themselves (tests/router/test_access_log.py), and recording from a running router
(tests/e2e/test_simulated.py).
"""

from __future__ import annotations

import gzip
import io
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.prompts import pooled_hit_rate, prompts
from bench.recording import LeftOut, RecordingError, TraceRecorder, access_log_lines
from bench.workloads import WorkloadSpec, build_workload
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.cli import app


def line(at: float, blocks: list[str] | None, tail: int = 3, **fields: Any) -> dict[str, Any]:
    """A line of the access log about a prompt of these blocks of 16 tokens, and `tail` more."""
    named = {} if blocks is None else {"block_size": 16, "block_hashes": blocks}
    length = 16 * len(blocks if blocks is not None else [0] * 2) + tail
    return {
        "logger": "router.access", "event": "request", "at": at, "status": 200, "attempts": 1, "prompt_tokens": length,
        "prompt_blocks": length // 16 + 1, "output_tokens": 7, "cached_tokens": 16, **named, **fields,
    }  # fmt: skip


def recorded(file: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with TraceRecorder(file) as recorder:
        for each in lines:
            recorder.add(each)
        recorder.finish()
    assert list(file.parent.iterdir()) == [file], "nothing else is left"
    return [orjson.loads(row) for row in file.read_bytes().splitlines()]


def test_rows_are_in_the_order_of_arrival_and_numbered_in_it(tmp_path: Path) -> None:
    late, early = line(1000.25, ["b", "c"], session="s2"), line(1000.0, ["a", "b"], 0, session="s1")
    first, second = recorded(tmp_path / "trace.jsonl", [late, early])
    lengths = {"output_length": 7, "block_size": 16}
    assert first == {"timestamp": 0.0, "input_length": 32, "hash_ids": [0, 1], "session": "0", **lengths}
    assert second == {"timestamp": 250.0, "input_length": 35, "hash_ids": [1, 2], "session": "1", **lengths}


def test_nothing_of_a_line_but_lengths_times_and_numbers_is_kept(tmp_path: Path) -> None:
    secret = line(1.0, ["5ec2e7", "b10c"], request_id="5ec2e7", model="5ec2e7", session="5ec2e7", path="/v1/5ec2e7")
    recorded(tmp_path / "trace.jsonl", [secret])
    assert b"5ec2e7" not in (tmp_path / "trace.jsonl").read_bytes()


def test_a_prompt_whose_blocks_are_unknown_shares_nothing(tmp_path: Path) -> None:
    lines = [line(1.0, ["a"]), line(2.0, None), line(3.0, ["a", "b"])]
    rows = recorded(tmp_path / "trace.jsonl", lines)
    assert [row["hash_ids"] for row in rows] == [[0], [1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param({"status": 400}, LeftOut.FAILED, id="refused"),
        pytest.param({"failures": ["broken"]}, LeftOut.FAILED, id="broken off"),
        pytest.param({"output_tokens": None}, LeftOut.NO_USAGE, id="no usage"),
        pytest.param({"output_tokens": 0}, LeftOut.NO_USAGE, id="no token"),
    ],
)
def test_what_cannot_be_replayed_is_left_out_and_counted(
    tmp_path: Path, fields: dict[str, Any], reason: LeftOut
) -> None:
    with TraceRecorder(tmp_path / "trace.jsonl") as recorder:
        assert not recorder.add(line(1.0, ["a"], **fields))
        assert recorder.left_out == {reason: 1}
        assert not recorder.add({"at": 1.0, "status": 200, "attempts": 1})
        assert recorder.left_out[LeftOut.NOT_A_PROMPT] == 1
        with pytest.raises(RecordingError, match="no request was recorded"):
            recorder.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_was_sent_again_is_recorded_once(tmp_path: Path) -> None:
    assert len(recorded(tmp_path / "trace.jsonl", [line(1.0, ["a"], attempts=2, failures=["refused"])])) == 1


def test_a_log_without_blocks_is_no_trace(tmp_path: Path) -> None:
    with TraceRecorder(tmp_path / "trace.jsonl") as recorder:
        recorder.add(line(1.0, None))
        with pytest.raises(RecordingError, match="--access-log-blocks"):
            recorder.finish()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        pytest.param({"block_hashes": ["a", "b", "c"]}, "3 block_hashes of 16 tokens", id="another number of blocks"),
        pytest.param({"block_hashes": [1]}, "block_hashes is no list of digests", id="no digests"),
        pytest.param({"block_hashes": 7}, "block_hashes is no list of digests", id="no list"),
        pytest.param({"prompt_tokens": "many"}, "prompt_tokens is 'many'", id="no length"),
        pytest.param({"block_size": 0}, "block_size is 0", id="no block size"),
        pytest.param({"at": None}, "at is None, no number", id="no time"),
        pytest.param({"cached_tokens": "all"}, "cached_tokens is 'all'", id="no count"),
        pytest.param({"failures": 3}, "failures is no list", id="no failures"),
        pytest.param({"failures": ["broken"], "attempts": "one"}, "attempts is 'one'", id="no attempts"),
    ],
)
def test_a_line_that_no_router_writes_is_refused(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    with TraceRecorder(tmp_path / "t") as recorder:
        with pytest.raises(RecordingError, match=f"^log, line 7: not a request of an access log: {why}"):
            recorder.add(line(1.0, ["a"]) | fields, "log, line 7")
        assert not recorder.written


@pytest.mark.parametrize("missing", ["at", "status", "output_tokens", "block_size"])
def test_a_missing_field_is_named_with_file_and_line(tmp_path: Path, missing: str) -> None:
    wrong = {name: value for name, value in line(1.0, ["a"]).items() if name != missing}
    file = tmp_path / "log"
    file.write_bytes(orjson.dumps(line(0.0, ["a"])) + b"\n" + orjson.dumps(wrong) + b"\n")
    code, said = run("--access-log", str(file), "-o", str(tmp_path / "trace"))
    if missing == "output_tokens":  # an engine may state none
        assert (code, "its answer states no length: 1" in said) == (0, True)
    else:
        assert code == 2
        message = f"error: {file}, line 2: not a request of an access log: it has no field {missing}"
        assert message in said.replace("\n", "")


def test_lines_of_other_logs_are_passed_over_and_others_named() -> None:
    log = io.BytesIO(b'{"logger":"router","event":"request"}\n\n' + orjson.dumps(line(1.0, ["a"])) + b"\n")
    assert len(list(access_log_lines(log, "log"))) == 1
    with pytest.raises(RecordingError, match=r"log, line 1: it is not JSON; it looks like key=value"):
        list(access_log_lines(io.BytesIO(b"ts=1 event=request status=200\n"), "log"))
    with pytest.raises(RecordingError, match=r"log, line 2: it is not JSON$"):
        list(access_log_lines(io.BytesIO(b"{}\nwhat\n"), "log"))


FAMILIES = st.lists(st.sampled_from("abcdef"), max_size=5)


@pytest.mark.simulation
@settings(max_examples=15, deadline=None)
@given(asked=st.lists(st.tuples(FAMILIES, st.integers(1, 15), st.floats(0, 100)), min_size=1, max_size=12))
def test_the_replay_shares_what_was_shared(tmp_path_factory: pytest.TempPathFactory, asked: list[Any]) -> None:
    """Digests name whole prefixes: the first n blocks of two prompts are equal in the replay just when they were."""
    file = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    lines = []
    for path, tail, at in asked:
        digests = ["".join(path[: depth + 1]) for depth in range(len(path))]
        lines.append((at, digests, line(at, digests, tail)))
    lines.sort(key=lambda each: each[0])
    recorded(file, [each for _, _, each in lines])
    workload = build_workload(WorkloadSpec("trace", trace=file))
    replayed = list(prompts(workload, load_tokenizer("gpt2")))
    assert [len(prompt.tokens) for prompt in replayed] == [each["prompt_tokens"] for _, _, each in lines]
    for first, (_, digests, _) in zip(replayed, lines, strict=True):
        for second, (_, others, _) in zip(replayed, lines, strict=True):
            for depth in range(1, min(len(digests), len(others)) + 1):
                same = first.tokens[: 16 * depth] == second.tokens[: 16 * depth]
                assert same == (digests[:depth] == others[:depth])
    counted = Counter(key for _, digests, _ in lines for key in digests)
    shared = sum(count - 1 for count in counted.values())
    total = sum(each["prompt_tokens"] for _, _, each in lines)
    assert pooled_hit_rate(replayed, 1 << 20, 16) == pytest.approx(16 * shared / total)


def run(*options: str, stdin: bytes = b"") -> tuple[int, str]:
    ran = CliRunner().invoke(app, ["record", *options], input=stdin)
    return ran.exit_code, ran.output


def test_access_logs_become_a_trace(tmp_path: Path) -> None:
    log = b"".join(orjson.dumps(line(float(at), ["a", "b"])) + b"\n" for at in range(5))
    (tmp_path / "log.gz").write_bytes(gzip.compress(log))
    out = tmp_path / "trace.jsonl"
    code, said = run("--access-log", str(tmp_path / "log.gz"), "--access-log", "-", "-o", str(out), stdin=log)
    assert code == 0, said
    assert f"10 requests with {10 * 35} prompt tokens, {16 / 35:.1%} of them found in cache" in said
    assert len(out.read_bytes().splitlines()) == 10
    code, said = run("--access-log", str(tmp_path / "log.gz"), "-o", str(out), "--limit", "3")
    assert len(out.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "code"),
    [
        pytest.param(("http://127.0.0.1:1", "--access-log", "x"), 2, id="two sources"),
        pytest.param(("--access-log", "/nonexistent"), 1, id="no such file"),
        pytest.param(("http://127.0.0.1:1",), 1, id="no router"),
    ],
)
def test_what_cannot_be_recorded_is_said(tmp_path: Path, options: tuple[str, ...], code: int) -> None:
    assert run(*options, "-o", str(tmp_path / "t.jsonl"))[0] == code
    assert list(tmp_path.iterdir()) == []
