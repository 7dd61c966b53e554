"""Tells the ReplicaSet controller which workers to keep when some have to go: those whose caches are used most."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from controller.kube.client import ApiError, KubeClient
from controller.kube.kinds import POD
from controller.objects.names import Object
from controller.reconcile.inventory import Key
from controller.status.deletion_cost import ANNOTATION, deletion_costs
from controller.status.observed import RouterReport

INTERVAL = 30.0
"""Seconds between two changes of a cluster's costs: order matters when somebody scales down, not every second."""


class DeletionCosts:
    """Annotates worker pods, at most every `INTERVAL` seconds a cluster."""

    def __init__(self, client: KubeClient, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._changed_at: dict[Key, float] = {}

    async def update(self, key: Key, reports: Mapping[str, RouterReport | str], pods: list[Object]) -> None:
        """Writes the costs that differ. Raises `ApiError`; a pod that is gone is none."""
        costs = deletion_costs(reports, pods)
        if len(costs) < 2 or self._clock() - self._changed_at.get(key, float("-inf")) < INTERVAL:
            return
        for pod in pods:
            name, annotations = pod["metadata"]["name"], pod["metadata"].get("annotations") or {}
            cost = costs.get(name)
            if cost is None or annotations.get(ANNOTATION, "0") == str(cost):
                continue
            self._changed_at[key] = self._clock()
            try:
                await self._client.merge(POD, key[0], name, {"metadata": {"annotations": {ANNOTATION: str(cost)}}})
            except ApiError as error:
                if error.status != 404:
                    raise

    def forget(self, key: Key) -> None:
        """The cluster is gone."""
        self._changed_at.pop(key, None)
