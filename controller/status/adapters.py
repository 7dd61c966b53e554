"""The LoRA adapters of a KVCluster, as the routers' reports show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controller.api.model import KVClusterSpec
from controller.status.pod_problems import as_sentence
from controller.status.reasons import ConditionReason, Finding
from controller.status.report import ModelReport, RouterReport
from controller.status.workload import count


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """One listed adapter: on how many of the `ready` workers it is loaded, and why it is not on another."""

    name: str
    loaded: int
    ready: int
    worker: str = ""
    """A worker whose engine refused it."""
    why: str = ""
    """The words in which it did."""

    @property
    def complete(self) -> bool:
        """Whether every ready worker has it, and there is one."""
        return 0 < self.ready <= self.loaded


def figures(spec: KVClusterSpec, reports: Sequence[RouterReport]) -> list[AdapterFigures]:
    """The listed adapters in their order; of several routers the one that sees an adapter on the fewest workers
    counts."""
    return [
        min((_figures(adapter.name, _model(spec, report)) for report in reports), key=lambda each: each.loaded)
        for adapter in (spec.model.adapters if reports else ())
    ]


def _model(spec: KVClusterSpec, report: RouterReport) -> ModelReport:
    """What the router reports of this cluster's model: it may serve others, too."""
    return next((model for model in report.models if model.name in spec.served_names), ModelReport(spec.model_name))


def _figures(name: str, model: ModelReport) -> AdapterFigures:
    refused = {worker: why for worker, why in model.missing.get(name, {}).items() if why}
    worker = min(refused, default="")
    return AdapterFigures(name, model.adapters.get(name, 0), model.ready, worker, refused.get(worker, ""))


def status(adapters: Sequence[AdapterFigures]) -> dict[str, Any] | None:
    """`adapters` of the status; None while nothing is known of any."""
    if not adapters:
        return None
    loaded = sum(adapter.complete for adapter in adapters)
    return {
        "summary": f"{loaded}/{len(adapters)}",
        "loaded": loaded,
        "wanted": len(adapters),
        "each": [{"name": adapter.name, "workers": adapter.loaded} for adapter in adapters],
    }


def refusals(adapters: Sequence[AdapterFigures]) -> list[Finding]:
    """A finding for each adapter that an engine refuses."""
    return [
        Finding(
            ConditionReason.ADAPTER_REFUSED,
            f"Adapter {adapter.name} is loaded on {adapter.loaded} of {count(adapter.ready, 'ready worker')}; "
            f"{adapter.worker} says: {as_sentence(adapter.why)}",
        )
        for adapter in adapters
        if adapter.why
    ]


def readiness(adapters: Sequence[AdapterFigures]) -> Finding:
    """Reason and message of AdaptersReady, of at least one adapter with at least one ready worker."""
    if refused := refusals(adapters):
        return refused[0]
    ready = adapters[0].ready
    for adapter in adapters:
        if not adapter.complete:
            message = f"Adapter {adapter.name} is loaded on {adapter.loaded} of {count(ready, 'ready worker')}."
            return Finding(ConditionReason.ADAPTERS_LOADING, message)
    listed = "the listed adapter" if len(adapters) == 1 else f"all {count(len(adapters), 'adapter')}"
    where = "the only worker has" if ready == 1 else f"all {count(ready, 'worker')} have"
    return Finding(ConditionReason.ADAPTERS_LOADED, f"{where[0].upper()}{where[1:]} {listed} loaded.")
