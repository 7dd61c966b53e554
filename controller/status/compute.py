"""The status of a KVCluster."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from controller.component import Component
from controller.status import raw
from controller.status.cache import cache_status, percent
from controller.status.conditions import conditions
from controller.status.endpoint import endpoint
from controller.status.observed import Observed
from controller.status.pods import active, is_ready
from controller.status.report import RouterReport
from controller.status.workload import workload

SELECTOR_LABELS = {
    "app.kubernetes.io/component": Component.WORKER.value,
    "app.kubernetes.io/instance": "",
    "app.kubernetes.io/name": "kvcluster",
}


def compute(observed: Observed, previous: Mapping[str, Any] | None, now: datetime | str) -> dict[str, Any]:
    """The whole status object: it replaces the last one, and equals it when there is nothing to write.

    `previous` is the status as it stands, None before the first. `now` is aware, or RFC 3339.
    """
    before = previous if previous is not None else {}
    cache = cache_status(_reports(observed), raw.mapping(before, "cache"))
    permille = cache.get("hitRatePermille")
    status = {
        "observedGeneration": observed.generation,
        "conditions": conditions(observed, raw.objects(before, "conditions"), raw.moment(now)),
        "workers": workload(observed, Component.WORKER).figures(),
        "routers": workload(observed, Component.ROUTER).figures(),
        "strategy": _strategy(observed, before),
        "endpoint": endpoint(observed, raw.text(before, "endpoint")),
        "hitRate": None if permille is None else percent(permille),
        "cache": cache,
        "selector": selector(observed.name),
    }
    # An API server drops nulls, and a status with them would never equal the one that is stored.
    return {name: value for name, value in status.items() if value is not None}


def selector(name: str) -> str:
    """Label selector of a cluster's worker pods, for the scale subresource."""
    labels = {**SELECTOR_LABELS, "app.kubernetes.io/instance": name}
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _strategy(observed: Observed, before: Mapping[str, Any]) -> str | None:
    if observed.spec is not None:
        return observed.spec.router.strategy.value
    return raw.text(before, "strategy") or None


def _reports(observed: Observed) -> list[RouterReport]:
    """What the routers that are ready say."""
    ready = [raw.name(pod) for pod in active(observed.pods, Component.ROUTER) if is_ready(pod)]
    answers = (observed.reports.get(name) for name in ready)
    return [answer for answer in answers if isinstance(answer, RouterReport)]
