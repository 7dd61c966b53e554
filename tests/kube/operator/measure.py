"""How fast the operator is, and what it costs an API server.

    python -m tests.kube.operator.measure [--clusters 50] [--idle 60] [--rounds 5]

The API server is the fake one, which answers in about a millisecond: the figures are the operator's own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import typer

from tests.kube.operator.support import OBJECTS, OPERATOR, Cluster, Controller, prepared
from tests.processes import eventually

READS = ("get", "list", "watch")


async def _created(cluster: Cluster, name: str) -> float:
    start = time.perf_counter()
    await cluster.create(name)
    while not await cluster.has(OBJECTS, name):  # noqa: ASYNC110  another process makes them
        await asyncio.sleep(0.005)
    return time.perf_counter() - start


def _counts(cluster: Cluster, start: int) -> Counter[str]:
    return Counter(
        "reads" if each.verb in READS else "writes" for each in cluster.server.requests[start:] if each.user == OPERATOR
    )


async def measure(clusters: int, idle: float, rounds: int, folder: Path) -> None:
    """Prints one line a figure."""
    async with prepared() as cluster:
        controller = Controller(cluster.operator_kubeconfig(folder / "kubeconfig"), folder / "controller.log")
        await controller.start()
        await cluster.create("first")
        await eventually(lambda: cluster.has(OBJECTS, "first"), "the operator runs", 60)
        times = [await _created(cluster, f"one-{number}") for number in range(rounds)]
        typer.echo(
            f"apply to all {len(OBJECTS)} objects: median {statistics.median(times):.3f} s, min {min(times):.3f}, "
            f"max {max(times):.3f}, of {rounds}"
        )
        start = time.perf_counter()
        names = [f"many-{number}" for number in range(clusters)]
        await asyncio.gather(*(cluster.create(name) for name in names))
        for name in names:
            await eventually(lambda name=name: cluster.has(OBJECTS, name), f"{name} is complete", 300)
        typer.echo(f"{clusters} KVClusters at once: all objects after {time.perf_counter() - start:.1f} s")
        await asyncio.sleep(5)
        before, cpu = len(cluster.server.requests), controller.cpu_seconds()
        await asyncio.sleep(idle)
        counts, cpu = _counts(cluster, before), controller.cpu_seconds() - cpu
        typer.echo(
            f"{clusters + rounds + 1} idle KVClusters for {idle:g} s: {counts['writes']} writes, {counts['reads']} "
            f"reads, {100 * cpu / idle:.1f} % of a core, {controller.rss_megabytes()} MB"
        )
        await controller.stop()


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(options.clusters, options.idle, options.rounds, Path(folder)))


if __name__ == "__main__":
    main()
