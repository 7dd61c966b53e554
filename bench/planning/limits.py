"""What no number of workers can better: the times on an idle worker that finds cached what came before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from bench.prompts import PooledCache, Prompt
from bench.result import quantile
from bench.simulation.cluster import ClusterShape, Delays, SeededTokens
from bench.simulation.errors import refusal
from kvcache.keys import PrefixKeys, pack_tokens
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.request import EngineRequest


class Limit(StrEnum):
    """Why no number of workers will do, or none that is allowed."""

    CONTEXT = "context"
    """Too many requests are longer than the context of a worker."""
    TTFT_ALONE = "ttft_alone"
    """Prefill alone takes too long."""
    TPOT_ALONE = "tpot_alone"
    """Decoding a single answer takes too long."""
    MOST_WORKERS = "most_workers"
    """The largest number of workers that is allowed is too small, or more of them do not help."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What an idle worker takes for the requests of a workload, one at a time. Seconds and tokens."""

    requests: int
    refused: int
    """Those that no worker takes."""
    ttft_p95: float
    ttft_p95_tokens: int
    """Prompt tokens that have to be computed for that time."""
    ttft_longest: float
    longest_prompt: int
    tpot_p95: float

    @property
    def refused_share(self) -> float:
        return self.refused / self.requests if self.requests else 0.0


class LoneEngine:
    """Times of single requests on an idle engine, by running the engine. Each length is run once."""

    def __init__(self, shape: ClusterShape) -> None:
        self._kind = shape.kind
        self._known: dict[int, float] = {}

    def prefill(self, tokens: int) -> float:
        """Seconds until the first token, if so many tokens have to be computed."""
        size = self._kind.engine.block_size
        blocks = max(-(-tokens // size), 1)
        found = self._known.get(blocks)
        if found is None:
            engine = Engine(self._kind.engine, self._kind.latency)
            length = min(blocks * size, self._kind.engine.max_model_len - 1)
            engine.submit(EngineRequest("alone", [0] * length, 1, SeededTokens(0), ignore_eos=True), 0.0)
            outputs = engine.advance(0.0)
            while not outputs and (due := engine.next_event()) is not None:
                outputs = engine.advance(due)
            found = self._known[blocks] = outputs[0].at
        return found

    def decode(self, prompt_tokens: int, output_tokens: int) -> float:
        """Mean seconds between two tokens of an answer that is generated alone."""
        return self._kind.latency.decode_step(1, prompt_tokens + output_tokens / 2)


def floor_of(prompts: Iterable[Prompt], shape: ClusterShape, delays: Delays, workers: int) -> Floor | None:
    """The floor of a workload, if one cache has the blocks of `workers` workers; None if there is no request that a
    worker takes."""
    engine, size = LoneEngine(shape), shape.engine.block_size
    cache = PooledCache(workers * shape.ranks * (shape.engine.blocks + shape.engine.cpu_blocks))
    times: list[tuple[float, int]] = []
    decoding: list[float] = []
    requests = refused = longest = 0
    for prompt in prompts:
        requests += 1
        length, output = len(prompt.tokens), prompt.request.max_tokens
        if refusal(length, output, shape.engine.max_model_len) is not None:
            refused += 1
            continue
        longest = max(longest, length)
        keys = PrefixKeys(pack_tokens(prompt.tokens), size, prompt.scope).all()
        computed = length - cache.admit(keys, (length - 1) // size) * size
        times.append((engine.prefill(computed), computed))
        if output > 1:
            decoding.append(engine.decode(length, output))
    if not times:
        return None
    times.sort()
    hops = 2 * delays.network
    seconds, computed = times[min(int(0.95 * (len(times) - 1) + 0.5), len(times) - 1)]
    return Floor(
        requests=requests,
        refused=refused,
        ttft_p95=seconds + hops,
        ttft_p95_tokens=computed,
        ttft_longest=times[-1][0] + hops,
        longest_prompt=longest,
        tpot_p95=quantile(sorted(decoding), 0.95) if decoding else 0.0,
    )
