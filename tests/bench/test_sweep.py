"""Sweeps of simulations: the grid, the figures, several processes, the files, an interrupt.

Not covered: what a single simulation gives (test_simulate.py, test_scenarios.py).
"""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from bench.record import Record
from bench.result import Result
from bench.simulation import ClusterShape, Scenario
from bench.simulation.play import Play, play_out, result_of
from bench.simulation.processes import Processes
from bench.simulation.sweep import (
    PARAMETERS,
    SweepError,
    applied,
    grid,
    parse_axes,
    plot_sweep,
    print_sweep,
    run_sweep,
    write_sweep,
)
from bench.workloads import WorkloadSpec
from kvcache.profiles import profile
from kvcluster.cli import app
from worker.emulator.engine.config import EngineConfig

pytestmark = pytest.mark.simulation

LLAMA = profile("llama-2-13b-a100-40gb")
RAG = Path(__file__).parents[2] / "examples" / "rag.yaml"


def play(limit: int = 20) -> Play:
    engine = EngineConfig(blocks=LLAMA.blocks(16), max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096)
    return Play(ClusterShape(2, engine, LLAMA.latency, LLAMA.model), "cache_aware", WorkloadSpec("hot", limit=limit))


def test_every_combination_is_played_in_order() -> None:
    axes = parse_axes(["workers=1,2", "strategy=round_robin,cache_aware"])
    points = run_sweep(play(), axes, jobs=1)
    assert [tuple(point.values.values()) for point in points] == [
        (1, "round_robin"), (1, "cache_aware"), (2, "round_robin"), (2, "cache_aware"),
    ]  # fmt: skip
    assert [len(point.result.workers) for point in points] == [1, 1, 2, 2]
    assert [point.result.strategy for point in points] == ["round_robin", "cache_aware"] * 2


def failing() -> Play:
    return Play(play().shape, "cache_aware", WorkloadSpec("trace", trace=Path("/nonexistent")))


def test_processes_change_nothing_but_the_time_and_what_fails_in_one_is_raised_here() -> None:
    plays = [applied(play(), point) for point in grid(parse_axes(["workers=1,2", "rate=6,30"]))]
    seen: list[int] = []
    with Processes(1) as alone, Processes(2) as several:
        assert several.map(result_of, plays, seen.append) == alone.map(result_of, plays)
        assert seen[-1] == 4
        with pytest.raises(ValueError, match="cannot read"):
            several.map(result_of, [failing(), failing()])


def independent(records: list[Record]) -> tuple[float, float, int]:
    prompt = sum(record.prompt_tokens for record in records)
    cached = sum(record.cached_tokens for record in records)
    latest = sorted(record.first_token - record.sent for record in records)
    return cached / prompt, latest[len(latest) // 2], prompt - cached


def test_the_figures_are_sums_over_the_records() -> None:
    (point,) = run_sweep(play(31), {"workers": [2]}, jobs=1)
    _, records = play_out(play(31))
    hit_rate, median, computed = independent(records)
    row = point.row()
    assert row["hit_rate"] == pytest.approx(hit_rate)
    assert row["ttft_p50_seconds"] == pytest.approx(median)
    assert row["computed_tokens"] == computed


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [
        pytest.param("workers", 5, lambda p: p.shape.workers, id="workers"),
        pytest.param("strategy", "linear", lambda p: p.strategy, id="strategy"),
        pytest.param("rate", 3.5, lambda p: p.workload.rate, id="rate"),
        pytest.param("seed", 4, lambda p: p.workload.seed, id="seed"),
        pytest.param("limit", 7, lambda p: p.workload.limit, id="limit"),
        pytest.param("blocks", 300, lambda p: p.shape.engine.blocks, id="blocks"),
        pytest.param("cpuBlocks", 50, lambda p: p.shape.engine.cpu_blocks, id="cpu blocks"),
        pytest.param("routers", 3, lambda p: p.scenario.routers.count, id="routers"),
        pytest.param("networkDelay", 0.5, lambda p: p.delays.network, id="network delay"),
        pytest.param("feedDelay", 0.25, lambda p: p.delays.feed, id="feed delay"),
    ],
)
def test_a_parameter_changes_what_it_names(name: str, value: object, changed: object) -> None:
    assert changed(applied(play(), {name: value})) == value
    assert changed(play()) != value


def test_a_profile_brings_its_own_engine_and_blocks_are_set_after_it() -> None:
    l4 = profile("llama-3.1-8b-l4-24gb")
    other = applied(play(), {"blocks": 500, "profile": l4.name}).shape
    assert (other.latency, other.engine.blocks) == (l4.latency, 500)
    assert applied(play(), {"profile": l4.name}).shape.engine.blocks == l4.blocks(16)
    assert set(PARAMETERS) >= {"workers", "profile"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param(["worker=2"], "one of these names: workers", id="an unknown name"),
        pytest.param(["workers="], "write NAME=VALUE", id="no value"),
        pytest.param(["workers=two"], "invalid literal", id="no number"),
        pytest.param(["workers=0"], "1 or more", id="too small"),
        pytest.param(["rate=inf"], "above 0", id="infinite"),
        pytest.param(["rate=1", "rate=2"], "swept already", id="twice"),
        pytest.param(["strategy=best"], "best", id="an unknown strategy"),
        pytest.param(["seed=" + ",".join(map(str, range(200))), "limit=" + ",".join(map(str, range(1, 60)))],
                     "11,800 simulations", id="too many"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_sweep_is_said(given: list[str], said: str) -> None:
    with pytest.raises(SweepError, match=said):
        parse_axes(given)


def test_an_impossible_combination_is_said_before_anything_is_played() -> None:
    with pytest.raises(SweepError, match="profile=no-such, workers=1: unknown profile"):
        run_sweep(play(), {"profile": ["no-such"], "workers": [1]})


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["workers", "seed", "limit"]), st.lists(st.integers(1, 9), min_size=1, unique=True), min_size=1
    )
)
def test_the_grid_is_the_product(axes: dict[str, list[int]]) -> None:
    points = grid(axes)
    count = 1
    for values in axes.values():
        count *= len(values)
    assert len(points) == len({tuple(point.values()) for point in points}) == count
    assert all(list(point) == list(axes) for point in points)


def test_the_files_hold_what_the_table_shows(tmp_path: Path) -> None:
    points = run_sweep(play(), parse_axes(["workers=1,2", "strategy=cache_aware,round_robin"]), jobs=1)
    write_sweep(points, tmp_path)
    plot_sweep(tmp_path / "sweep.svg", points, "hot")
    assert (tmp_path / "sweep.svg").stat().st_size > 10_000
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    whole = orjson.loads((tmp_path / "sweep.json").read_bytes())["points"]
    assert [float(row["hit_rate"]) for row in rows] == [each["result"]["hit_rate"] for each in whole]
    assert [row["workers"] for row in rows] == ["1", "1", "2", "2"]
    console = Console(record=True, width=120)
    print_sweep(console, points)
    shown = console.export_text()
    assert all(f"{float(row['hit_rate']):.1%}" in shown for row in rows)


def test_the_command_sweeps(tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app,
        ["simulate", str(RAG), "-w", "hot", "--limit", "20", "--strategies", "cache_aware", "--sweep", "workers=1,2",
         "--jobs", "1", "--out", str(tmp_path)],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert {file.name for file in tmp_path.iterdir()} == {"sweep.json", "sweep.csv", "sweep.png"}


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["simulate", str(RAG), "--sweep", "workers=x", "--out", str(tmp_path)])
    assert ran.exit_code == 2


@pytest.mark.process
def test_an_interrupt_ends_every_process(tmp_path: Path) -> None:
    """Only the first process gets the signal, as from a supervisor."""
    command = [sys.executable, "-m", "kvcluster", "simulate", str(RAG), "-w", "rag", "--limit", "100000"]
    options = ["--sweep", "workers=2,3", "--jobs", "2", "--out", str(tmp_path), "--strategies", "cache_aware"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(children(process.pid)) < 3:  # two that simulate, and Python's resource tracker
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        started = children(process.pid)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    while any(Path(f"/proc/{child}").exists() for child in started):
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def children(pid: int) -> set[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in file.read_text().split()} if file.exists() else set()


def test_a_result_says_what_was_played() -> None:
    result: Result
    result, _ = play_out(
        Play(
            play().shape,
            "cache_aware",
            WorkloadSpec("hot", limit=5),
            scenario=Scenario.model_validate({"routers": {"count": 2}}),
        )
    )
    assert result.config["scenario"] == {"routers": {"count": 2}}
    assert result.config["mode"] == "simulated"
