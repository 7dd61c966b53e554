"""`adapters`: the traffic of `rag` for each of three LoRA adapters of one base, mixed.

Each adapter has documents of its own, asked about as in `rag`, so its prompts share blocks with one another and with no
other adapter's. The names are those of examples/adapters.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from heapq import merge

from bench.workloads.base import TimedRequest, Workload, WorkloadSpec
from bench.workloads.rag import RATE, REQUESTS, rag

ADAPTERS = ("sql", "law", "poems")


def of_adapter(spec: WorkloadSpec, name: str) -> Workload:
    """The part of `adapters` that asks for one of them: a third of the requests, at a third of the rate."""
    count, rate = spec.limit or REQUESTS, spec.rate or RATE
    position = ADAPTERS.index(name)
    share = len(range(position, count, len(ADAPTERS)))
    seed = len(ADAPTERS) * spec.seed + position
    part = rag(replace(spec, name="rag", seed=seed, limit=max(share, 1), rate=rate / len(ADAPTERS)))

    def requests() -> Iterator[TimedRequest]:
        for request in part.requests():
            yield replace(request, body={**request.body, "model": name})

    return replace(part, name="adapters", seed=spec.seed, config={**part.config, "model": name}, requests=requests)


def adapters(spec: WorkloadSpec) -> Workload:
    """The workload of these parameters. Raises `WorkloadError` if the standard library has no sources."""
    parts = [of_adapter(spec, name) for name in ADAPTERS]
    count, rate = sum(part.count for part in parts), spec.rate or RATE

    def requests() -> Iterator[TimedRequest]:
        mixed = merge(*(part.requests() for part in parts), key=lambda request: request.at)
        for index, request in enumerate(mixed):
            yield replace(request, index=index)

    config = {**parts[0].config, "rate": rate, "model": list(ADAPTERS)}
    return Workload("adapters", spec.seed, count, config, requests)
