"""Live processes beside their simulation: a run that is recorded and replayed hits as much, because the trace shares
what the prompts shared, and requests that no worker takes fail with the same errors.

Not covered: what is in a trace and what is left out (tests/bench/test_recording.py), and times, which would need a
quiet machine (docs/simulator.md).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
import pytest_asyncio
from rich.console import Console

from bench.prompts import pooled_hit_rate
from bench.record import ErrorCause, Record
from bench.result import Result, summarise
from bench.run import LiveOptions, measure
from bench.simulation.play import Play, asked, play_out
from bench.workloads import WorkloadSpec, build_workload
from kvcluster.commands.simulate import shape_of
from tests.e2e.support import ClusterUnderTest, StartCluster

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster) -> AsyncIterator[ClusterUnderTest]:
    async with start_cluster(workers=4, speed=SPEED) as running:
        yield running


async def driven(cluster: ClusterUnderTest, workload: WorkloadSpec) -> tuple[Result, list[Record]]:
    """What the workload gave."""
    played = await measure(cluster.url, build_workload(workload), LiveOptions(speed=SPEED), Console(quiet=True))
    return summarise(played.records, played.info), played.records


async def test_a_replayed_recording_hits_what_the_live_run_hit(tmp_path: Path, cluster: ClusterUnderTest) -> None:
    trace = tmp_path / "trace.jsonl"
    live = WorkloadSpec("rag", limit=REQUESTS, rate=12.0)
    shape = shape_of(cluster.local.manifest.spec)
    url = cluster.local.management_url
    limited = await recording(url, "-o", str(trace), "--limit", str(REQUESTS))
    interrupted = await recording(url, "-o", str(tmp_path / "interrupted.jsonl"))
    result, _ = await driven(cluster, live)
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


async def test_requests_that_no_worker_takes_fail_with_the_same_errors(
    tmp_path: Path, cluster: ClusterUnderTest
) -> None:
    """Of lengths around the context of 4,096 tokens, and enough refusals in a row for the router to doubt them."""
    lengths = [(4097, 8), (4096, 8), (4095, 8), (4090, 8), (100, 8), *[(5000, 8)] * 6, (50, 3)]
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(
        b"".join(
            orjson.dumps(
                {
                    "timestamp": 1000 * number,
                    "input_length": length,
                    "output_length": output,
                    "hash_ids": [100 * number + block for block in range(-(-length // 512))],
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for number, (length, output) in enumerate(lengths)
        )
    )
    workload = WorkloadSpec("trace", trace=trace)
    _, live = await driven(cluster, workload)
    _, simulated = play_out(Play(shape_of(cluster.local.manifest.spec), "cache_aware", workload))

    def said(records: list[Record]) -> list[tuple[ErrorCause | None, str, int | None]]:
        return [(record.error, record.detail, record.output_tokens) for record in records]

    assert said(simulated) == said(live)
    assert sum(record.error is not None for record in live) == 8
