"""Carries a plan out at the API server, and remembers how the server wrote down what it was told."""

from __future__ import annotations

import logging

from controller.kube.client import ApiError, KubeClient
from controller.kube.kinds import DEPLOYMENT
from controller.objects.names import APPLIED_HASH, FIELD_MANAGER, Cluster, Object
from controller.reconcile.comparison import fingerprint
from controller.reconcile.inventory import Inventory, Key, Ref, owner_of
from controller.reconcile.plan import Plan, ref_of, replicas_to_hand_over
from controller.status.observed import Problem, ProblemKind
from kvcache.logs import event

logger = logging.getLogger(__name__)

HANDOVER_MANAGER = f"{FIELD_MANAGER}-replicas"
"""States a Deployment's replicas in our stead from when an autoscaler is switched on until that changes them."""


class Writer:
    """Writes, and the memory of them. `written` is what `plan` compares with."""

    def __init__(self, client: KubeClient, inventory: Inventory) -> None:
        self._client = client
        self._inventory = inventory
        self.written: dict[Ref, tuple[str, str]] = {}

    async def carry_out(self, plan: Plan, cluster: Cluster, live: dict[Ref, Object]) -> list[Problem]:
        """Applies and deletes. What the server refuses for good is a problem, and the rest goes on; raises `ApiError`
        where it makes sense to come back later."""
        problems = []
        for manifest in plan.apply:
            ref = ref_of(manifest)
            try:
                await self._apply(manifest, live.get(ref), cluster)
            except ApiError as error:
                if error.passing:
                    raise
                event(logger, logging.ERROR, "apply_refused", object=str(ref), namespace=ref.namespace, why=str(error))
                problems.append(Problem(ProblemKind.APPLY_FAILED, str(ref), error.message))
        for item in plan.delete:
            ref = Ref(ref_of(item).kind, item["metadata"]["namespace"], item["metadata"]["name"])
            event(logger, logging.INFO, "deleting", object=str(ref), namespace=ref.namespace)
            await self._client.delete(item)
            self.written.pop(ref, None)
        return problems

    def forget(self, key: Key) -> None:
        """The cluster is gone."""
        namespace, name = key
        for ref in [ref for ref in self.written if ref.namespace == namespace]:
            item = self._inventory.get(ref.kind, (ref.namespace, ref.name))
            if item is None or owner_of(item) == (namespace, name):
                del self.written[ref]

    async def _apply(self, manifest: Object, current: Object | None, cluster: Cluster) -> None:
        ref = ref_of(manifest)
        replicas = replicas_to_hand_over(manifest, current, _initial_replicas(cluster))
        if replicas is not None and current is not None:
            await self._client.apply(_replicas(manifest, replicas), HANDOVER_MANAGER)
        answer = await self._client.apply(manifest)
        if replicas is not None and current is None:
            answer = await self._client.apply(_replicas(manifest, replicas), HANDOVER_MANAGER)
        event(logger, logging.INFO, "applied", object=str(ref), namespace=ref.namespace, new=current is None)
        self._inventory.put(ref.kind, answer)
        stamp = manifest["metadata"]["annotations"][APPLIED_HASH]
        self.written[ref] = (stamp, fingerprint(answer, manifest))


def _initial_replicas(cluster: Cluster) -> int:
    scaling = cluster.spec.autoscaling
    wanted = cluster.spec.workers.replicas
    return wanted if scaling is None else min(max(wanted, scaling.min), scaling.max)


def _replicas(manifest: Object, replicas: int) -> Object:
    metadata = manifest["metadata"]
    return {
        "apiVersion": DEPLOYMENT.api_version,
        "kind": DEPLOYMENT.name,
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        "spec": {"replicas": replicas},
    }
