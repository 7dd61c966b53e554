"""Hit rate of each LoRA adapter on a shared cluster, against clusters of their own of the same size in all.

python -m bench.adapters                     in virtual time, over several seeds
python -m bench.adapters --raw runs.jsonl    of a live run: kvcluster compare --workload adapters --raw runs.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from bench.prompts import prompts
from bench.record import Record, read_records
from bench.simulation import ClusterShape, Delays, Simulation
from bench.workloads import Workload, WorkloadSpec
from bench.workloads.adapters import ADAPTERS, adapters, of_adapter
from kvcache.profiles import DEFAULT_PROFILE, profile
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from worker.emulator.engine.config import EngineConfig

WORKERS = 6
"""Of the shared cluster; each of the separate ones has a third."""


def shape(workers: int) -> ClusterShape:
    """A cluster of the default profile."""
    gpu = profile(DEFAULT_PROFILE)
    engine = EngineConfig(
        blocks=gpu.blocks(16),
        max_num_batched_tokens=gpu.max_num_batched_tokens,
        max_num_seqs=gpu.max_num_seqs,
        max_model_len=gpu.max_model_len,
        max_loras=len(ADAPTERS),
    )
    return ClusterShape(workers, engine, gpu.latency, gpu.model)


def simulated(workload: Workload, workers: int, tokenizer: Tokenizer) -> list[Record]:
    """The records of the workload on so many workers, under the strategy cache_aware."""
    simulation = Simulation(shape(workers), "cache_aware", Delays())
    return simulation.run(prompts(workload, tokenizer), lambda sent, answered, failed: None)


def hit_rate(records: Iterable[Record]) -> float:
    """Cached over all prompt tokens of these requests."""
    counted = [(record.cached_tokens or 0, record.prompt_tokens or 0) for record in records]
    return sum(cached for cached, _ in counted) / max(sum(tokens for _, tokens in counted), 1)


def by_adapter(spec: WorkloadSpec, records: Iterable[Record]) -> dict[str, float]:
    """Hit rate of each adapter in a run of the workload `adapters`."""
    asked = {request.index: str(request.body["model"]) for request in adapters(spec).requests()}
    found = list(records)
    return {name: hit_rate(record for record in found if asked[record.index] == name) for name in ADAPTERS}


def rows(spec: WorkloadSpec, tokenizer: Tokenizer) -> Iterator[tuple[str, float, float]]:
    """(adapter, hit rate on the shared cluster, on a cluster of its own)."""
    shared = by_adapter(spec, simulated(adapters(spec), WORKERS, tokenizer))
    for name in ADAPTERS:
        own = simulated(of_adapter(spec, name), WORKERS // len(ADAPTERS), tokenizer)
        yield name, shared[name], hit_rate(own)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m bench.adapters", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=1800)
    parser.add_argument("--rate", type=float, default=24.0)
    parser.add_argument("--raw", type=Path, help="records of a live run with --seed 0 and the same limit and rate")
    options = parser.parse_args()
    spec = WorkloadSpec("adapters", 0, options.limit, options.rate)
    if options.raw is not None:
        for name, rate in by_adapter(spec, read_records(options.raw)).items():
            sys.stdout.write(f"{name:8} {rate:7.1%}\n")
        return
    tokenizer = load_tokenizer("gpt2")
    sys.stdout.write("seed  adapter   shared   of its own   difference\n")
    for seed in range(options.seeds):
        for name, shared, own in rows(replace(spec, seed=seed), tokenizer):
            sys.stdout.write(f"{seed:4}  {name:8} {shared:7.1%} {own:12.1%} {100 * (shared - own):+11.1f} pt\n")


if __name__ == "__main__":
    main()
