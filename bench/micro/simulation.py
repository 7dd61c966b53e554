"""How fast simulations run: `python -m bench.micro.simulation [--json] [--trace FILE] [--requests N]`.

Requests a second of CPU time of one core, for the two kinds of simulation that take longest: few workers with long
prompts (with `--trace`, those of a recorded trace; otherwise synthetic ones of the same length), and a thousand workers
with short prompts. `--requests` plays the latter alone with any number of requests, and tells how long each slice of
25,000 of them took: nothing but the caches and the records grows with their number.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import orjson
from rich.console import Console
from rich.table import Column, Table

from bench.prompts import prompts
from bench.simulation import ClusterShape, Simulation
from bench.simulation.run import Progress
from bench.workloads import Workload, WorkloadSpec, build_workload
from bench.workloads.base import TimedRequest, completion, token_ids
from kvcache.profiles import profile
from kvcache.tokens.tokenizer import load_tokenizer
from worker.emulator.engine.config import EngineConfig

PROFILE = "llama-3.1-8b-h100-80gb"
LONG_WORKERS, LONG_REQUESTS, LONG_RATE = 8, 500, 3.4
MANY_WORKERS, MANY_REQUESTS, MANY_RATE = 1_000, 20_000, 4_000.0
SLICE = 25_000
"""Requests after which `--requests` prints how far it is."""
TURN_TOKENS = 4_000
"""Tokens by which the next prompt of a long conversation is longer."""


def _shape(workers: int, blocks: int) -> ClusterShape:
    chosen = profile(PROFILE)
    engine = EngineConfig(
        blocks=blocks,
        max_num_batched_tokens=chosen.max_num_batched_tokens,
        max_num_seqs=chosen.max_num_seqs,
        max_model_len=min(chosen.max_model_len, blocks * 16),
    )
    return ClusterShape(workers, engine, chosen.latency, chosen.model)


def _conversations(count: int) -> Workload:
    """Conversations of 1 to 6 turns: prompts of 14,000 tokens and answers of 340 on average."""

    def requests() -> Iterator[TimedRequest]:
        random = Random("conversations")
        for index in range(count):
            name, tokens = index // 6, TURN_TOKENS * (1 + index % 6)
            yield completion(
                index, index / LONG_RATE, token_ids(f"conversation {name}", tokens), random.randint(80, 600)
            )

    return Workload("conversations", 0, count, {}, requests)


def _measured(
    name: str,
    workload: Workload,
    shape: ClusterShape,
    progress: Progress = lambda sent, answered, failed: None,
) -> dict[str, object]:
    simulation = Simulation(shape, "cache_aware")
    asked = prompts(workload, load_tokenizer(shape.tokenizer))
    started = time.process_time()
    records = simulation.run(asked, progress)
    seconds = time.process_time() - started
    return {
        "simulation": name,
        "workers": shape.workers,
        "requests": len(records),
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in records),
        "cpu_seconds": round(seconds, 1),
        "requests_a_second": round(len(records) / seconds, 1),
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class _Slices:
    """Prints how long each slice of a run took."""

    def __init__(self) -> None:
        self._sent = 0
        self._since = time.process_time()

    def progress(self, sent: int, answered: int, failed: int) -> None:
        """So many requests are sent."""
        if sent - self._sent < SLICE:
            return
        now = time.process_time()
        each = (now - self._since) / (sent - self._sent)
        sys.stderr.write(f"{sent:,} requests: {1e3 * each:.3f} ms each, {_peak_mib():,} MiB\n")
        self._sent, self._since = sent, now


def measure(requests: float = 1.0, trace: Path | None = None) -> list[dict[str, object]]:
    """Both simulations; `requests`: share of the usual numbers of requests and workers."""
    long = _conversations(int(LONG_REQUESTS * requests))
    if trace is not None:
        long = build_workload(WorkloadSpec("trace", limit=int(LONG_REQUESTS * requests), trace=trace))
    many = build_workload(WorkloadSpec("hot", limit=int(MANY_REQUESTS * requests), rate=MANY_RATE * requests))
    return [
        _measured("long prompts", long, _shape(LONG_WORKERS, 27_000)),
        _measured("many workers", many, _shape(max(1, int(MANY_WORKERS * requests)), 27_000)),
    ]


def measure_many(requests: int) -> list[dict[str, object]]:
    """The simulation of many workers with so many requests; what each slice of them took goes to the standard error."""
    many = build_workload(WorkloadSpec("hot", limit=requests, rate=MANY_RATE))
    return [_measured("many workers", many, _shape(MANY_WORKERS, 27_000), _Slices().progress)]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.simulation", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--share", type=float, default=1.0, help="share of the usual numbers of requests and workers")
    parser.add_argument(
        "--trace", type=Path, help="a trace in Mooncake's form: its first requests are the long prompts"
    )
    parser.add_argument(
        "--requests", type=int, help="play the thousand workers alone, with so many requests (a million, say)"
    )
    options = parser.parse_args(arguments)
    rows = measure(options.share, options.trace) if options.requests is None else measure_many(options.requests)
    if options.json:
        sys.stdout.buffer.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        return
    table = Table(*(Column(name.replace("_", " "), justify="right") for name in rows[0]), title="Simulated requests")
    for row in rows:
        table.add_row(*(f"{value:,}" if not isinstance(value, str) else value for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
