"""A local cluster's processes, with stand-ins for workers and routers: start, restart, stop, logs, and no orphans.

Not covered: real workers and routers (tests/kvcluster/test_up), and which processes a manifest asks for
(test_desired_processes).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import httpx
import pytest

from controller.local.cluster import Options, StartError
from controller.local.process import ProcessState
from runtime.sockets import PortTakenError, listen
from tests.processes import eventually, runs

pytestmark = pytest.mark.process


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(workers={"replicas": 2, "drainSeconds": 20})


async def test_serves_until_the_context_is_left_and_leaves_nothing_behind(manifest, local_cluster):
    async with local_cluster(manifest) as cluster:
        await cluster.wait_ready()
        assert [worker.name for worker in cluster.workers] == ["demo-worker-0", "demo-worker-1"]
        assert {process.state for process in cluster.processes} == {ProcessState.READY}
        assert len({cluster.url, cluster.management_url, *(worker.url for worker in cluster.workers)}) == 4
        pids = [process.pid for process in cluster.processes]
        assert all(runs(pid) for pid in pids)
        log_dir = cluster.log_dir
        assert f"stand-in {cluster.router.pid}" in (log_dir / "demo-router.log").read_text()
    assert not any(runs(pid) for pid in pids)
    assert {process.state for process in cluster.processes} == {ProcessState.STOPPED}
    assert not log_dir.exists()
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(cluster.url)


async def test_a_killed_process_comes_back_under_its_address(manifest, local_cluster):
    async with local_cluster(manifest) as cluster:
        await cluster.wait_ready()
        before = cluster.workers[1]
        os.kill(before.pid, signal.SIGKILL)
        # The listening socket outlives the process: this request waits for the next one instead of being refused.
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"{before.url}/health", timeout=30)
        assert answer.json()["pid"] != before.pid
        await eventually(lambda: cluster.workers[1].state is ProcessState.READY)
        after = cluster.workers[1]
        assert (after.url, after.restarts) == (before.url, 1)
        assert after.pid not in (before.pid, None)
        assert cluster.workers[0].restarts == cluster.router.restarts == 0


async def test_changes_are_reported_in_order(manifest, local_cluster):
    changes = []
    async with local_cluster(manifest, Options(on_change=changes.append)) as cluster:
        await cluster.wait_ready()
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        await eventually(lambda: cluster.workers[0].restarts == 1 and cluster.workers[0].state is ProcessState.READY)
    reported = [change for change in changes if change.name == "demo-worker-0"]
    states = ["starting", "ready", "backoff", "starting", "ready", "stopping", "stopped"]
    assert [change.state for change in reported] == states
    assert reported[2].detail == "was killed by SIGKILL; starting again in 0.1 s"


async def test_a_process_that_never_gets_ready_is_given_up_with_what_it_wrote(manifest, local_cluster):
    async with local_cluster(manifest, demo_worker_1="die") as cluster:
        with pytest.raises(
            StartError, match=r"(?s)does not start: demo-worker-1 .*exited with code 3.*stand-in \d+ die"
        ):
            await cluster.wait_ready()
        pids = [process.pid for process in cluster.processes if process.pid]
    assert not any(runs(pid) for pid in pids)


async def test_not_ready_in_time_names_the_process(manifest, local_cluster):
    async with local_cluster(manifest, demo_worker_0="unready") as cluster:
        with pytest.raises(StartError, match=r"not ready after 1 s: .*demo-worker-0 is starting"):
            await cluster.wait_ready(timeout=1)


async def test_workers_the_router_does_not_match_are_named_with_the_reason(manifest, local_cluster):
    async with local_cluster(manifest, demo_router="blind") as cluster:
        with pytest.raises(
            StartError, match=r"the router says of demo-worker-0: its block size is 32; demo-worker-1: "
        ):
            await cluster.wait_ready(timeout=3)


async def test_leaving_by_an_exception_waits_for_no_request(make_manifest, local_cluster):
    manifest = make_manifest(workers={"replicas": 1, "drainSeconds": 86_400})
    pids = []

    async def fail() -> None:
        async with local_cluster(manifest, demo_worker_0="deaf") as cluster:
            await cluster.wait_ready()
            pids.append(cluster.workers[0].pid)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()
    assert not runs(pids[0])


async def test_a_process_deaf_to_sigterm_is_killed(make_manifest, local_cluster):
    manifest = make_manifest(workers={"replicas": 1, "drainSeconds": 0})
    async with local_cluster(manifest, demo_worker_0="deaf") as cluster:
        await cluster.wait_ready()
        pid = cluster.workers[0].pid
    assert not runs(pid)


async def test_kill_cuts_the_drain_short(make_manifest, local_cluster):
    manifest = make_manifest(workers={"replicas": 1, "drainSeconds": 86_400})
    async with local_cluster(manifest, demo_worker_0="deaf") as cluster:
        await cluster.wait_ready()
        pid = cluster.workers[0].pid
        cluster.kill()
    assert not runs(pid)


async def test_a_frozen_process_is_ended_too(manifest, local_cluster):
    async with local_cluster(manifest) as cluster:
        await cluster.wait_ready()
        pid = cluster.workers[0].pid
        os.kill(pid, signal.SIGSTOP)
    assert not runs(pid)


async def test_output_is_echoed_by_name_and_logged(manifest, local_cluster, tmp_path):
    lines = []
    options = Options(log_dir=tmp_path / "logs", echo=lambda name, line: lines.append((name, line)))
    async with local_cluster(manifest, options) as cluster:
        await cluster.wait_ready()
        expected = [(process.name, f"stand-in {process.pid} ") for process in cluster.processes]
    assert sorted(lines) == sorted(expected)
    assert (tmp_path / "logs" / "demo-router.log").read_text() == f"{expected[0][1]}\n"


async def test_a_taken_port_is_named_with_its_flag(manifest, local_cluster):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"port {port} on 127\.0\.0\.1 is taken.*--management-port"):
            async with local_cluster(manifest, Options(management_port=port)):
                pass


SUPERVISE = f"""
import asyncio, json, sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
from tests.controller.conftest import build_manifest, standins
from controller.local.cluster import LocalCluster, Options

async def main():
    manifest = build_manifest(workers={{"replicas": 2}})
    options = Options(log_dir=Path(sys.argv[1]))
    async with LocalCluster(manifest, options, desired=standins(demo_worker_1="deaf")) as cluster:
        await cluster.wait_ready()
        print(json.dumps([process.pid for process in cluster.processes]), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
async def test_children_die_with_a_killed_supervisor(frozen, tmp_path):
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", SUPERVISE, str(tmp_path), stdout=PIPE)
    pids = json.loads(await supervisor.stdout.readline())
    assert all(runs(pid) for pid in pids)
    if frozen and sys.platform == "linux":
        os.kill(pids[1], signal.SIGSTOP)
    supervisor.kill()
    await supervisor.wait()
    await eventually(lambda: not any(runs(pid) for pid in pids))
