"""From the options of the laboratory's commands to what is run and measured, and where it comes from."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.comparison import Origin
from bench.experiment import ExperimentOptions
from bench.rate_search import SearchOptions
from bench.result import Measurement, WarmUp
from bench.slo import Slo, parse_duration
from bench.workloads import Arrivals, Process, Sharing, WorkloadSpec
from bench.workloads.file import SUFFIXES
from controller.api.model import KVCluster
from kvcluster.options import LoadOptions, MeasureOptions

HIDDEN = "(not shown)"


def workload_spec(load: LoadOptions, context: int | None = None) -> WorkloadSpec:
    """The workload asked for; `context` tokens is the longest request that the workers take, if that is known.

    Raises `ValueError` for an arrival process that there is not.
    """
    if load.arrivals is not None and load.arrivals not in set(Process):
        raise ValueError(f"--arrivals must be one of {', '.join(Process)}, not {load.arrivals!r}")
    if load.cv is not None and load.arrivals is None:
        raise ValueError("--cv is that of gamma arrivals: add --arrivals gamma")
    return WorkloadSpec(
        name=load.workload or ("rag" if load.trace is None else "trace"),
        seed=load.seed,
        limit=load.limit,
        rate=load.rate,
        trace=load.trace,
        context=load.context or context,
        api=load.api,
        arrivals=None if load.arrivals is None else Arrivals(Process(load.arrivals), load.cv),
        time_scale=load.time_scale,
        format=load.format,
        as_text=load.as_text,
        sharing=Sharing(load.shared_prefix, load.prefixes, load.share_sessions),
    )


def _warm_up(text: str) -> WarmUp:
    if text.isdigit():
        return WarmUp(requests=int(text))
    try:
        return WarmUp(seconds=parse_duration(text))
    except ValueError as error:
        raise ValueError(f"--warm-up takes a number of requests or a time: {error}") from None


def _bound(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def experiment_options(workload: WorkloadSpec, measured: MeasureOptions) -> ExperimentOptions:
    """What is done with the workload. Raises `ValueError`."""
    slo = Slo(_bound("--slo-ttft", measured.slo_ttft), _bound("--slo-tpot", measured.slo_tpot))
    search = SearchOptions(slo, measured.attainment, measured.tolerance) if measured.find_rate else None
    return ExperimentOptions(workload, Measurement(_warm_up(measured.warm_up), slo), measured.repeats, search)


def _shown(value: Any) -> Any:
    """A manifest without the values of environment variables, which may be secrets."""
    if isinstance(value, dict):
        return {
            name: [{**each, **({"value": HIDDEN} if "value" in each else {})} for each in below]
            if name == "env" and isinstance(below, list)
            else _shown(below)
            for name, below in value.items()
        }
    return [_shown(each) for each in value] if isinstance(value, list) else value


def origin(load: LoadOptions, manifest: KVCluster | None = None, routers: Mapping[str, str] | None = None) -> Origin:
    """The command line of this process, and the manifest and the workload file that it names."""
    files = {}
    if manifest is not None:
        fields = manifest.model_dump(mode="json", by_alias=True, exclude_unset=True)
        files["manifest"] = yaml.safe_dump(_shown(fields), sort_keys=False, allow_unicode=True)
    if load.workload is not None and load.workload.endswith(SUFFIXES):
        files[load.workload] = Path(load.workload).read_text(encoding="utf-8", errors="replace")
    return Origin(shlex.join(["kvcluster", *sys.argv[1:]]), files, routers or {})
