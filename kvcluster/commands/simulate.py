"""`kvcluster simulate` and `kvcluster predict`: a manifest's engines in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.compare import SimulateOptions, compare_simulated
from bench.predict import agreement, print_agreement, replay
from bench.prompts import prompts
from bench.result import read_records
from bench.simulate import ClusterShape, Delays
from bench.workloads import build_workload
from controller.api.load import load_manifest
from controller.api.model import KVClusterSpec
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.commands.terminal import exits, output
from kvcluster.commands.workload import Load, checked_strategies
from worker.emulator.engine.config import EngineConfig


def shape_of(spec: KVClusterSpec) -> ClusterShape:
    """The workers of a manifest as the emulator runs them. Its speed does not matter in virtual time."""
    profile = spec.profile
    return ClusterShape(
        workers=spec.workers.replicas,
        engine=EngineConfig(
            blocks=spec.blocks,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_num_seqs=profile.max_num_seqs,
            max_model_len=spec.max_model_len,
            block_size=spec.cache.block_size,
        ),
        latency=profile.latency,
        model=spec.model_name,
        tokenizer=spec.tokenizer,
    )


class NothingToSimulateError(ValueError):
    """The manifest asks for no workers."""


@exits(OSError)
def simulate(file: str, strategies: Sequence[str], load: Load, delays: Delays, *, out: Path, raw: Path | None) -> None:
    """Compares strategies in virtual time."""
    manifest = load_manifest(file)
    names = checked_strategies(manifest, strategies)
    shape = shape_of(manifest.spec)
    if not shape.workers:
        raise NothingToSimulateError("spec.workers.replicas: 0 leaves nothing to simulate; set it to 1 or more")
    compare_simulated(shape, names, SimulateOptions(load.spec(), delays, raw), out, output())


@exits(OSError)
def predict(file: str, raw: Path, load: Load) -> None:
    """Compares the times to first token in the records `raw` with those that the latency model predicts."""
    shape = shape_of(load_manifest(file).spec)
    asked = prompts(build_workload(load.spec()), load_tokenizer(shape.tokenizer))
    print_agreement(output(), agreement(replay(read_records(raw), asked, shape)))
