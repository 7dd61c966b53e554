"""Seeded workloads: which requests come, and when. The same workload serves live endpoints and the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from bench.workloads.adapters import adapters
from bench.workloads.agents import agents
from bench.workloads.arrivals import Arrivals, Process
from bench.workloads.base import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    Sharing,
    TimedRequest,
    TokenIds,
    Workload,
    WorkloadError,
    WorkloadSpec,
)
from bench.workloads.conversation import WORDS, conversation
from bench.workloads.file import SUFFIXES
from bench.workloads.mixed import from_file
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
    "Arrivals",
    "Process",
    "Sharing",
    "TimedRequest",
    "TokenIds",
    "Workload",
    "WorkloadError",
    "WorkloadSpec",
    "build_workload",
]


def _checked(spec: WorkloadSpec) -> None:
    """Raises `WorkloadError` for parameters that are wrong, or that this workload does not have."""
    if spec.limit is not None and spec.limit < 1:
        raise WorkloadError(f"limit must be 1 or more, not {spec.limit}")
    if spec.rate is not None and not 0 < spec.rate < float("inf"):
        raise WorkloadError(f"rate must be above 0 requests a second, not {spec.rate}")
    if spec.trace is not None and spec.name != "trace":
        raise WorkloadError(f"the workload {spec.name} replays no file; leave --trace out, or use --workload trace")
    if spec.name != "trace" and (spec.time_scale is not None or spec.format is not None or spec.sharing):
        raise WorkloadError(f"the workload {spec.name} replays no file; options about traces need --workload trace")
    if spec.time_scale is not None and not 0 < spec.time_scale < float("inf"):
        raise WorkloadError(f"the time scale must be above 0, not {spec.time_scale}")
    if spec.time_scale is not None and spec.rate is not None:
        raise WorkloadError("--rate and --time-scale both say how fast the trace is replayed; use one")
    if spec.sharing.prefix_tokens < 0 or spec.sharing.prefixes < 1:
        raise WorkloadError("a shared prefix has 0 tokens or more, and there is 1 or more of them")
    if spec.arrivals is not None and spec.name == "agents":
        raise WorkloadError("in agents a call comes when the one before is over; leave --arrivals out")
    if spec.api not in APIS:
        raise WorkloadError(f"unknown api {spec.api!r}; use one of: {', '.join(APIS)}")
    if spec.api != "chat" and spec.name != "agents":
        raise WorkloadError(f"the workload {spec.name} is sent in one way only; leave --api out, or use agents")


def _in_words(request: TimedRequest) -> TimedRequest:
    """The request with a word for each token id of its prompt. Prompts share what they shared."""
    if request.prompt_tokens is None:
        return request
    words = "".join(f" {WORDS[token % len(WORDS)]}" for token in request.body["prompt"])
    return replace(request, body={**request.body, "prompt": words}, prompt_tokens=None)


def build_workload(spec: WorkloadSpec) -> Workload:
    """The workload of this name, or in this file, and these parameters. Raises `WorkloadError`."""
    workload = _build(spec)
    if not spec.as_text:
        return workload

    def requests() -> Iterator[TimedRequest]:
        return map(_in_words, workload.requests())

    return replace(workload, config={**workload.config, "as_text": True}, requests=requests)


def _build(spec: WorkloadSpec) -> Workload:
    in_file = spec.name.endswith(SUFFIXES)
    if not in_file and spec.name not in WORKLOADS:
        raise WorkloadError(
            f"unknown workload {spec.name!r}; use one of: {', '.join(WORKLOADS)}, or the path of a YAML file"
        )
    _checked(spec)
    if in_file:
        return from_file(spec, _build)
    built = WORKLOADS[spec.name](spec)
    generated = {} if spec.name in ("agents", "trace") else {"arrivals": str(spec.process)}
    return replace(built, config={**built.config, **generated})
