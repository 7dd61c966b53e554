"""Seeded workloads: which requests come, and when. The same workload serves live endpoints and the simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.workloads.adapters import adapters
from bench.workloads.agents import agents
from bench.workloads.base import CHAT, COMPLETIONS, MESSAGES, TimedRequest, Workload, WorkloadError, WorkloadSpec
from bench.workloads.conversation import conversation
from bench.workloads.rag import rag
from bench.workloads.synthetic import answers, hot, uniform
from bench.workloads.trace import trace

APIS = ("chat", "messages")

WORKLOADS: Mapping[str, Callable[[WorkloadSpec], Workload]] = {
    "rag": rag,
    "chat": conversation,
    "uniform": uniform,
    "hot": hot,
    "answers": answers,
    "adapters": adapters,
    "agents": agents,
    "trace": trace,
}

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "MESSAGES",
    "WORKLOADS",
    "TimedRequest",
    "Workload",
    "WorkloadError",
    "WorkloadSpec",
    "build_workload",
]


def build_workload(spec: WorkloadSpec) -> Workload:
    """The workload of this name and these parameters. Raises `WorkloadError`."""
    try:
        build = WORKLOADS[spec.name]
    except KeyError:
        raise WorkloadError(f"unknown workload {spec.name!r}; use one of: {', '.join(WORKLOADS)}") from None
    if spec.limit is not None and spec.limit < 1:
        raise WorkloadError(f"limit must be 1 or more, not {spec.limit}")
    if spec.rate is not None and not spec.rate > 0:
        raise WorkloadError(f"rate must be above 0 requests a second, not {spec.rate}")
    if spec.trace is not None and spec.name != "trace":
        raise WorkloadError(f"the workload {spec.name} replays no file; leave --trace out, or use --workload trace")
    if spec.api not in APIS:
        raise WorkloadError(f"unknown api {spec.api!r}; use one of: {', '.join(APIS)}")
    if spec.api != "chat" and spec.name != "agents":
        raise WorkloadError(f"the workload {spec.name} is sent in one way only; leave --api out, or use agents")
    return build(spec)
