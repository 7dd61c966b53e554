"""Fitting a latency model to recorded runs: engines whose times are known, and records that tell too little.

Not covered: real engines.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench.profile_fit import FitError, agreement, fit_latency
from bench.prompts import prompts
from bench.record import ErrorCause, Record, write_records
from bench.simulation import ClusterShape, Delays, Simulation
from bench.workloads import WorkloadSpec, build_workload
from controller.api.load import validate_manifest
from controller.process_settings import flags, router_settings, worker_settings
from kvcache.profiles import PROFILES, LatencyError, LatencyModel, format_latency, parse_latency, profile
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.cli import app
from router.settings import Settings as RouterSettings
from worker.emulator.engine.config import EngineConfig
from worker.settings import Settings as WorkerSettings

START = LatencyModel(1.0, 1.0, 0.25, 1.0)


@cache
def record(name: str, workload: str, limit: int, rate: float) -> tuple[Record, ...]:
    """One run against one engine with the times of the profile."""
    one = profile(name)
    engine = EngineConfig(one.blocks(16), one.max_num_batched_tokens, one.max_num_seqs, 4096)
    simulation = Simulation(ClusterShape(1, engine, one.latency, one.model), "round_robin", Delays(network=0.0))
    asked = prompts(build_workload(WorkloadSpec(workload, limit=limit, rate=rate)), load_tokenizer("gpt2"))
    return tuple(simulation.run(asked, lambda sent, answered, failed: None))


SPEEDS = {"llama-2-13b-a100-40gb": 1.0, "llama-3.1-8b-h100-80gb": 3.0}


def runs(name: str) -> list[tuple[Record, ...]]:
    speed = SPEEDS[name]
    return [
        record(name, "uniform", 25, 0.2 * speed),
        record(name, "uniform", 50, 4.0 * speed),
        record(name, "answers", 30, 0.8 * speed),
    ]


@pytest.mark.parametrize("name", SPEEDS)
def test_the_times_of_an_emulated_engine_are_found(name: str) -> None:
    true = PROFILES[name].latency
    found = fit_latency(runs(name), START)
    assert found.prefill_base == pytest.approx(true.prefill_base, rel=0.02)
    assert found.prefill_block == pytest.approx(true.prefill_block, rel=0.01)
    assert found.prefill_cached == 0.25, "no prompt was cached entirely"
    for sequences in (1, 4, 12):
        for each in (600, 1500):
            step = true.decode_step(sequences, sequences * each)
            assert found.decode_step(sequences, sequences * each) == pytest.approx(step, rel=0.03)
    figures = agreement([record(name, "hot", 30, SPEEDS[name])], found)
    assert figures.prefill_error < 0.02
    assert figures.decode_error < 0.02


def test_outliers_change_little() -> None:
    idle, *busy = runs("llama-2-13b-a100-40gb")
    stalled = [replace(r, first_token=(r.first_token or 0.0) + 0.3) if r.index % 8 == 3 else r for r in idle]
    found, true = fit_latency([stalled, *busy], START), PROFILES["llama-2-13b-a100-40gb"].latency
    assert found.prefill_block == pytest.approx(true.prefill_block, rel=0.05)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        pytest.param([], "0 requests had the engine to themselves", id="nothing"),
        pytest.param(
            [Record(0, 0.0, 0.0, error=ErrorCause.UNAVAILABLE)] * 20, "0 requests had the engine", id="errors"
        ),
        pytest.param(
            [Record(n, n, n, n + 0.1, n + 0.2, prompt_tokens=64, output_tokens=2) for n in range(20)],
            "computed prompts of 1 lengths",
            id="one length",
        ),
        pytest.param(
            [Record(n, n, n, n + 0.01 * n, n + 0.5, prompt_tokens=64 * n, output_tokens=2) for n in range(1, 20)],
            "0 answers have 8 tokens or more",
            id="short answers",
        ),
    ],
)
def test_records_that_tell_too_little_are_refused_with_what_to_record(records: list[Record], message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit_latency([records], START)


def test_the_command_prints_what_a_manifest_takes_and_every_process_then_expects(tmp_path: Path) -> None:
    files = []
    for number, each in enumerate(runs("llama-3.1-8b-h100-80gb")):
        files.append(tmp_path / f"{number}.jsonl")
        write_records(files[-1], each)
    ran = CliRunner().invoke(app, ["profile", "fit", *map(str, files), "--check", str(files[0])])
    assert ran.exit_code == 0, ran.output
    part = yaml.safe_load(ran.stdout)
    manifest = validate_manifest(
        {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "a"}, **part}, "fitted"
    )
    latency = manifest.spec.profile.latency
    assert latency.decode == pytest.approx(0.00685, rel=0.02)
    assert RouterSettings.load(flags(router_settings(manifest.spec))).gpu.latency == latency
    assert WorkerSettings.load(flags(worker_settings(manifest.spec))).gpu.latency == latency
    (line,) = (line for line in ran.stdout.splitlines() if "--latency=" in line)
    assert RouterSettings.load([line.split()[-1]]).gpu.latency == latency


def test_times_are_read_as_they_are_written() -> None:
    times = {"prefill_block": 0.0006, "decode_token": 5.6e-08}
    assert parse_latency(format_latency(times), START) == START.with_times(times)
    assert parse_latency("", START) == START
    for wrong in ("decode", "decode=-1", "decode=inf", "speed=2", "block-size=32", "decode=0.1;prefill-base=1"):
        with pytest.raises(LatencyError, match="write NAME=SECONDS"):
            parse_latency(wrong, START)
