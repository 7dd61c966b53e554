"""Traces in every format: what a replay sends and when, what is recognised, and what is refused with line and field.

Not covered: the whole of any public trace, none of which is part of this repository; the rows here have their forms.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import orjson
import pytest

from bench.workloads import Arrivals, Process, Sharing, TimedRequest, WorkloadError, WorkloadSpec, build_workload
from bench.workloads.trace_formats import TraceFormat, recognised

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [0]},
    {"timestamp": 2000, "input_length": 1300, "output_length": 7, "hash_ids": [0, 1, 3]},
]
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,40,18,58,Conversation log
45.5,GPT-4,30,0,30,API log
118,GPT-4,50,27,77,Conversation log
"""
BURSTGPT_SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,a,43,GPT-4,90,44,134,Conversation log
19440161.0,b,2,ChatGPT,36,29,65,Conversation log
19440192.0,a,2,GPT-4,150,29,179,Conversation log
"""
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,0,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,374,44
2024-05-10 02:00:02.009930+02:00,396,109
"""
DATASET = [{"prompt": "What is a block?", "output_tokens": 10}, {"prompt": "And a prefix?", "output_tokens": 20}]
RESULT = {
    "request_throughput": 1.5,
    "start_times": [1000.5, 1000.0, 1002.0],
    "input_lens": [12, 20, 30],
    "output_lens": [3, 4, 0],
    "errors": ["", "", "timeout"],
}


def write(folder: Path, *rows: object, name: str = "trace") -> Path:
    file = folder / name
    text = rows[0] if isinstance(rows[0], str) else b"\n".join(map(orjson.dumps, rows)).decode() + "\n"
    file.write_text(str(text))
    return file


def replay(file: Path, **more: object) -> list[TimedRequest]:
    return list(build_workload(WorkloadSpec("trace", trace=file, **more)).requests())


# --- hash ids ---


def test_a_trace_shares_what_its_hash_ids_share(tmp_path: Path) -> None:
    requests = replay(write(tmp_path, *MOONCAKE))
    first, second, third = (r.body["prompt"] for r in requests)
    assert [r.prompt_tokens for r in requests] == [1100, 512, 1300] == [len(p) for p in (first, second, third)]
    assert [r.max_tokens for r in requests] == [5, 1, 7]
    assert [r.at for r in requests] == [0.0, 0.0, 2.0]
    assert second == first[:512]
    assert third[:1024] == first[:1024]
    assert third[1024:1100] != first[1024:]


@pytest.mark.parametrize("ids", [[7, 8], [7, 8, 9]], ids=["of full blocks", "of all blocks"])
def test_a_row_states_the_size_of_its_blocks(tmp_path: Path, ids: list[int]) -> None:
    rows = [
        {"timestamp": 0.5, "input_length": 40, "output_length": 1, "hash_ids": ids, "block_size": 16},
        {"timestamp": 9, "input_length": 40, "output_length": 1, "hash_ids": [7, 8, 1][: len(ids)], "block_size": 16},
    ]
    one, other = (request.body["prompt"] for request in replay(write(tmp_path, *rows)))
    assert len(one) == len(other) == 40
    assert one[:32] == other[:32]
    assert one[32:] != other[32:]


def test_the_seed_does_not_change_a_trace_and_the_limit_cuts_it(tmp_path: Path) -> None:
    file = write(tmp_path, *MOONCAKE)
    assert replay(file, seed=1)[:2] == replay(file, seed=2, limit=2)


# --- lengths only ---


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        (BURSTGPT, TraceFormat.BURSTGPT, [(0.0, 40, 18), (113.0, 50, 27)]),
        (BURSTGPT_SESSIONS, TraceFormat.BURSTGPT, [(0.0, 90, 44), (51.0, 36, 29), (82.0, 150, 29)]),
        (AZURE_2023, TraceFormat.AZURE, [(0.0, 374, 44), (4.314579, 396, 109)]),
        (AZURE_2024, TraceFormat.AZURE, [(0.0, 374, 44), (2.0, 396, 109)]),
        (orjson.dumps(RESULT).decode(), TraceFormat.VLLM_RESULT, [(0.0, 20, 4), (0.5, 12, 3)]),
    ],
    ids=["BurstGPT", "BurstGPT with sessions", "Azure 2023", "Azure 2024", "vLLM's result"],
)
def test_lengths_and_times_are_those_recorded_without_failures(
    tmp_path: Path, text: str, form: TraceFormat, expected: list[tuple[float, int, int]]
) -> None:
    file = write(tmp_path, text)
    assert recognised(file) is form
    requests = replay(file)
    assert [(pytest.approx(r.at), len(r.body["prompt"]), r.max_tokens) for r in requests] == expected
    assert replay(file, format=form.value) == requests
    (tmp_path / "trace.gz").write_bytes(gzip.compress(text.encode()))
    assert replay(tmp_path / "trace.gz") == requests
    windows = write(tmp_path, text.replace("\n", "\r\n"), name="windows")
    assert replay(windows) == requests


def test_prompts_of_lengths_share_nothing_unless_told(tmp_path: Path) -> None:
    file = write(tmp_path, BURSTGPT_SESSIONS)
    one, other, third = (r.body["prompt"] for r in replay(file))
    assert len({one[0], other[0], third[0]}) == 3
    one, other, third = (r.body["prompt"] for r in replay(file, sharing=Sharing(sessions=True)))
    assert third[:90] == one
    assert other[0] != one[0]
    one, other, third = (r.body["prompt"] for r in replay(file, sharing=Sharing(prefix_tokens=50)))
    assert one[:36] == other == third[:36]
    assert one[:50] == third[:50]
    assert one[50:90] != third[50:90]
    pools = {tuple(r.body["prompt"][:36]) for r in replay(file, sharing=Sharing(prefix_tokens=50, prefixes=1000))}
    assert len(pools) == 3


def test_prompts_that_are_text_are_sent_as_the_message_of_a_user(tmp_path: Path) -> None:
    requests = replay(write(tmp_path, *DATASET), rate=2.0)
    assert [r.body["messages"] for r in requests] == [[{"role": "user", "content": d["prompt"]}] for d in DATASET]
    assert [r.max_tokens for r in requests] == [10, 20]
    assert 0 < requests[0].at < requests[1].at


# --- arrivals ---


def test_a_rate_or_a_time_scale_stretches_a_trace(tmp_path: Path) -> None:
    file = write(tmp_path, *MOONCAKE)
    assert [r.at for r in replay(file, rate=0.5)] == [0.0, 0.0, 6.0]
    assert [r.at for r in replay(file, time_scale=4.0)] == [0.0, 0.0, 0.5]


def test_arrivals_can_be_drawn_at_the_rate_of_the_trace(tmp_path: Path) -> None:
    rows = [{**MOONCAKE[0], "timestamp": 100 * n} for n in range(400)]
    file = write(tmp_path, *rows)
    drawn = replay(file, arrivals=Arrivals(Process.CONSTANT))
    assert drawn[-1].at == pytest.approx(39.9)
    assert [r.body for r in drawn] == [r.body for r in replay(file)]
    assert replay(file, arrivals=Arrivals(), rate=100.0)[-1].at == pytest.approx(4.0, rel=0.3)


# --- refusals ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not JSON"),
        ("", "line 2: it is not JSON"),
        ("[]", "line 2: a row is an object, not list"),
        ('{"timestamp": 1}', "line 2: input_length must be a whole number of 1 or more, not None"),
        ('{"timestamp":-1,"input_length":1,"output_length":1,"hash_ids":[1]}', "line 2: timestamp must be"),
        ('{"timestamp":1,"input_length":true,"output_length":1,"hash_ids":[1]}', "line 2: input_length must be"),
        ('{"timestamp":1,"input_length":1,"output_length":"9","hash_ids":[1]}', "line 2: output_length must be"),
        ('{"timestamp":1,"input_length":1,"output_length":1,"hash_ids":[-1]}', "line 2: hash_ids must be"),
        (
            '{"timestamp":1,"input_length":513,"output_length":1,"hash_ids":[1]}',
            "take 2 hash_ids of 512 tokens, not 1",
        ),
        ('{"timestamp":1,"input_length":9,"output_length":1,"hash_ids":[1],"block_size":0}', "block_size must be"),
    ],
    ids=[
        "no JSON", "empty", "no object", "missing field", "negative time", "truth for a length", "text for a length",
        "negative hash id", "too few hash ids", "no block size",
    ],
)  # fmt: skip
def test_a_bad_row_of_mooncakes_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path, "\n".join([orjson.dumps(MOONCAKE[0]).decode(), line, "{}", ""]))
    with pytest.raises(WorkloadError, match=message.replace("[", r"\[")):
        replay(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BURSTGPT.replace("45.5", "soon"), "line 3: Timestamp must be a number of seconds, not 'soon'"),
        (BURSTGPT.replace(",50,", ",5.5,"), "line 4: Request tokens must be a whole number of 0 or more, not '5.5'"),
        (BURSTGPT.replace("118", "4"), "line 4: its timestamp lies before that of the line above"),
        (BURSTGPT.replace(",77,", ","), "line 4: it has 5 columns, the header 6"),
        (BURSTGPT.replace("Timestamp", "Time"), "line 1: the header has no column 'Timestamp'"),
        (AZURE_2023.replace("2023-11-16 18:15:50.9951690", "noon"), "line 3: TIMESTAMP must be a date and time"),
        (AZURE_2023.replace(",109", ",inf"), "line 3: GeneratedTokens must be a whole number"),
        ("a,b\n1,2\n", "line 1: the format is not recognised by 'a,b'; name it with --format"),
        ('{"prompt": ""}\n', "line 1: prompt must be a text that is not empty"),
        ('{"prompt": "hi"}\n', "line 1: output_tokens must be a whole number"),
        ('{"request_throughput": 1}', "start_times is missing; run `vllm bench serve` with --save-result"),
        (orjson.dumps({**RESULT, "input_lens": [1]}).decode(), "differ"),
        (orjson.dumps({**RESULT, "output_lens": [1, -1, 1]}).decode(), "request 1: output_lens must be"),
        (2 * (orjson.dumps(RESULT).decode() + "\n"), "line 2: it is the result of another run"),
        (AZURE_2023.split("2023-", 1)[0] + "2023-11-16 18:15:46.68,0,44\n", "no requests that were answered, of 1"),
    ],
    ids=[
        "BurstGPT: time", "BurstGPT: tokens", "BurstGPT: order", "BurstGPT: columns", "BurstGPT: header",
        "Azure: time", "Azure: tokens", "unknown", "vLLM: no prompt", "vLLM: no length", "vLLM: no details",
        "vLLM: lists", "vLLM: a request", "vLLM: two runs", "failures only",
    ],
)  # fmt: skip
def test_an_unreadable_trace_names_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message.replace("[", r"\[").replace("(", r"\(")):
        replay(write(tmp_path, text), rate=1.0)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (MOONCAKE, {"sharing": Sharing(64)}, "records what its prompts share"),
        ([BURSTGPT], {"sharing": Sharing(sessions=True)}, "names no sessions"),
        (DATASET, {}, "records no times; give a --rate"),
        (MOONCAKE, {"rate": 1.0, "time_scale": 2.0}, "use one"),
        (MOONCAKE, {"time_scale": 0.0}, "time scale must be above 0"),
        (MOONCAKE, {"format": "csv"}, "unknown trace format 'csv'; use one of: mooncake"),
        (MOONCAKE, {"format": "azure"}, "line 1: the header has no column"),
    ],
    ids=[
        "shared twice", "no sessions", "no times", "rate and scale", "no scale", "unknown format", "another format"
    ],
)  # fmt: skip
def test_options_that_do_not_go_with_the_trace_are_refused(
    tmp_path: Path, rows: list[object], more: dict[str, object], message: str
) -> None:
    with pytest.raises(WorkloadError, match=message):
        replay(write(tmp_path, *rows), **more)


def test_a_trace_out_of_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="line 2: its timestamp lies before"):
        replay(write(tmp_path, MOONCAKE[2], MOONCAKE[0]))


def test_a_missing_empty_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot read the trace"):
        replay(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(WorkloadError, match="holds no requests"):
        replay(tmp_path / "empty.jsonl")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(BURSTGPT.encode())[:-12])
    with pytest.raises(WorkloadError, match="cannot read the trace"):
        replay(tmp_path / "cut.gz")
