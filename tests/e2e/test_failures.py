"""Processes that die, freeze and restart under load: no request fails whose first byte had not been sent.

Not covered: processes in pods (tests/kube/e2e), lost nodes and cut networks (tests/kube), how soon the router reacts
(tests/router, in virtual time), and two failures at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest

from bench.loadgen import LoadOptions, drive
from bench.record import Record
from bench.workloads import WorkloadSpec, build_workload
from tests.e2e.support import ClusterUnderTest
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

SPEED = 4.0
RATE = 8.0  # emulated: 32 requests a second on the wall clock
SECONDS = 7.0  # on the wall clock


async def _under_load(
    cluster: ClusterUnderTest, disturb: Callable[[], Awaitable[None]]
) -> tuple[list[Record], list[Record]]:
    """Drive the cluster, disturb it after a quarter of the answers; what failed before and after its first byte."""
    workload = build_workload(WorkloadSpec("rag", seed=3, limit=int(RATE * SPEED * SECONDS), rate=RATE))
    midway = asyncio.Event()

    def progress(sent: int, answered: int, failed: int) -> None:
        if answered >= workload.count // 4:
            midway.set()

    async def disturber() -> None:
        await midway.wait()
        await disturb()

    driving = asyncio.create_task(drive(cluster.url, workload, LoadOptions(speed=SPEED, timeout=60), progress))
    await disturber()
    driven = await driving
    assert len(driven.records) == workload.count
    failed = [record for record in driven.records if record.error is not None]
    return [r for r in failed if r.first_token is None], [r for r in failed if r.first_token is not None]


async def test_a_killed_worker_costs_only_streams_already_begun(start_cluster):
    async with start_cluster(workers=4, speed=SPEED) as cluster:

        async def kill() -> None:
            pid = cluster.local.workers[1].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

        unanswered, cut = await _under_load(cluster, kill)
        assert unanswered == []
        assert len(cut) <= 32, "only streams of one worker can have been cut"
        assert cluster.local.workers[1].restarts == 1
        await eventually(cluster.views_agree, "every view equals its worker's state", 30)


async def test_a_frozen_worker_leaves_the_candidates_and_comes_back(start_cluster):
    async with start_cluster(workers=4, speed=SPEED) as cluster:
        frozen = cluster.local.workers[2]
        assert frozen.pid is not None

        async def ready() -> dict[str, bool]:
            return {worker["worker_id"]: worker["ready"] for worker in await cluster.router_workers()}

        async def gone() -> bool:
            return not (await ready())[frozen.name]

        async def back() -> bool:
            return (await ready())[frozen.name]

        async def freeze() -> None:
            os.kill(frozen.pid, signal.SIGSTOP)
            try:
                await eventually(gone, "a frozen worker leaves the candidates", 30)
            finally:
                os.kill(frozen.pid, signal.SIGCONT)
            await eventually(back, "a worker that runs again is a candidate again", 30)

        unanswered, _ = await _under_load(cluster, freeze)
        assert unanswered == []
        await eventually(cluster.views_agree, "every view equals its worker's state", 30)


async def test_a_worker_restarted_under_its_address_is_noticed_by_its_epoch(start_cluster):
    async with start_cluster(workers=4, speed=SPEED) as cluster:
        before = cluster.local.workers[0]
        assert before.pid is not None
        old_epoch, _ = await cluster.worker_state(before.url)

        async def restart() -> None:
            os.kill(before.pid, signal.SIGTERM)

        unanswered, _ = await _under_load(cluster, restart)
        assert unanswered == []
        after = cluster.local.workers[0]
        assert after.url == before.url
        assert after.pid != before.pid
        await eventually(cluster.views_agree, "every view equals its worker's state", 30)
        epoch, _ = await cluster.router_view(after.name)
        assert epoch > old_epoch


async def test_a_restarted_router_loses_no_request_and_learns_every_view_again(start_cluster):
    async with start_cluster(workers=4, speed=SPEED) as cluster:
        before = cluster.local.router.pid
        assert before is not None

        async def restart() -> None:
            os.kill(before, signal.SIGTERM)

        unanswered, cut = await _under_load(cluster, restart)
        assert unanswered == []
        assert cut == [], "a router that is told to stop finishes what it has begun"
        assert cluster.local.router.pid != before
        await eventually(cluster.views_agree, "every view equals its worker's state", 30)
