"""Nothing outlives a supervisor, however that one ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.processes import eventually, runs

pytestmark = pytest.mark.process

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
