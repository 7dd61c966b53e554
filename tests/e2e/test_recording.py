"""A run of live processes, recorded and replayed in virtual time: the trace shares what the prompts shared, so the hit
rate is the same.

Not covered: what is in a trace and what is left out (tests/bench/test_recording.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from bench.prompts import pooled_hit_rate
from bench.run import BenchOptions, measure
from bench.simulation.play import Play, asked, play_out
from bench.workloads import WorkloadSpec, build_workload
from kvcluster.commands.simulate import shape_of
from tests.e2e.support import StartCluster

pytestmark = pytest.mark.process

BOUND = 0.03
"""By which the hit rates may differ: the live processes' timing decides on which workers a prompt is computed twice."""
REQUESTS = 150
SPEED = 4.0


async def recording(url: str, *options: str) -> Process:
    """A recorder that is connected."""
    command = ("-m", "kvcluster", "record", url, *options)
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE)
    assert process.stdout is not None
    assert (await process.stdout.readline()).startswith(b"recording from ")
    return process


async def test_a_replayed_recording_hits_what_the_live_run_hit(tmp_path: Path, start_cluster: StartCluster) -> None:
    trace = tmp_path / "trace.jsonl"
    live = WorkloadSpec("rag", limit=REQUESTS, rate=12.0)
    async with start_cluster(workers=4, speed=SPEED) as cluster:
        shape = shape_of(cluster.local.manifest.spec)
        url = cluster.local.management_url
        limited = await recording(url, "-o", str(trace), "--limit", str(REQUESTS))
        interrupted = await recording(url, "-o", str(tmp_path / "interrupted.jsonl"))
        options = BenchOptions(workload=live, speed=SPEED)
        result, _ = await measure(cluster.url, build_workload(live), options, Console(quiet=True))
        said = (await limited.communicate())[0].decode()
        interrupted.send_signal(signal.SIGINT)
        await interrupted.communicate()
    assert limited.returncode == interrupted.returncode == 0
    assert result.errors == 0
    rows = [orjson.loads(line) for line in trace.read_bytes().splitlines()]
    assert len(rows) == REQUESTS, said
    assert sum(row["input_length"] for row in rows) == sum(each.prompt_tokens for each in result.workers.values())
    assert f"{result.hit_rate:.1%} of them found in cache" in said
    assert sorted(os.listdir(tmp_path)) == ["interrupted.jsonl", "trace.jsonl"]  # noqa: PTH208  # in a coroutine

    spec = WorkloadSpec("trace", trace=trace, time_scale=1 / SPEED)
    ceilings = [
        pooled_hit_rate(asked(build_workload(each), shape), shape.capacity, shape.engine.block_size)
        for each in (live, spec)
    ]
    assert ceilings[1] == pytest.approx(ceilings[0], abs=0.002), "the same prefixes are shared, in the same order"
    replayed, _ = play_out(Play(shape, "cache_aware", spec))
    assert replayed.requests == REQUESTS
    assert replayed.hit_rate == pytest.approx(result.hit_rate, abs=BOUND)
