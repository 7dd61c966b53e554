"""The controller as the chart's pod runs it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from deploy.helm.docs import ROOT
from tests.processes import eventually, free_port

START_SECONDS = 120.0


class RunningController:
    """Where a controller can be asked."""

    def __init__(self, metrics: str, health: str) -> None:
        self.metrics = metrics
        """Host and port."""
        self.health = health
        """Base URL."""


@asynccontextmanager
async def running_controller(
    kubeconfig: Path, log: Path, settings: Mapping[str, str]
) -> AsyncIterator[RunningController]:
    """The controller with this environment, alive from entering to leaving."""

    def written() -> str:
        return log.read_text()

    metrics, health = free_port(), free_port()
    own = {
        "KUBECONFIG": str(kubeconfig),
        "CONTROLLER_HOST": "127.0.0.1",
        "CONTROLLER_METRICS_PORT": str(metrics),
        "CONTROLLER_HEALTH_PORT": str(health),
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controller.main"),
            cwd=ROOT,
            env={**os.environ, **settings, **own},
            stdout=output,
            stderr=output,
        )
    found = RunningController(f"127.0.0.1:{metrics}", f"http://127.0.0.1:{health}")
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:

            async def alive() -> bool:
                assert process.returncode is None, written()
                try:
                    return (await client.get(f"{found.health}/healthz")).status_code == 200
                except httpx.HTTPError:
                    return False

            await eventually(alive, "the controller is alive", START_SECONDS)
        yield found
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0, written()
