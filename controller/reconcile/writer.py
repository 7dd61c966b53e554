"""Writes to the API server: carries out a plan, and annotates worker pods with their deletion costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from controller.kube.client import KubeClient
from controller.kube.kinds import DEPLOYMENT, POD
from controller.objects.names import APPLIED_HASH, FIELD_MANAGER, Cluster, Object
from controller.reconcile.inventory import Inventory, Key, Ref, owner_of
from controller.reconcile.plan import (
    Plan,
    fingerprint,
    foreign_owner,
    has_drifted,
    ref_of,
    replicas_to_hand_over,
)
from controller.status.deletion_cost import ANNOTATION, deletion_costs
from controller.status.observed import ReconcileProblem
from controller.status.reasons import ConditionReason
from controller.status.report import RouterReport
from runtime.kube.errors import KubeApiError
from runtime.logs import EventLogger

logger = EventLogger(__name__)

HANDOVER_MANAGER = f"{FIELD_MANAGER}-replicas"
"""Field manager that states a Deployment's replicas from when an autoscaler is switched on until it changes them."""
COST_INTERVAL = 30.0
"""Seconds between two changes of a cluster's deletion costs. They matter when it is scaled down, not every second."""


class NameTakenError(Exception):
    """An object with this name exists already; the message says whose it is."""


@dataclass(slots=True)
class ApplyResult:
    """What became of a plan."""

    problems: list[ReconcileProblem] = field(default_factory=list)
    """What the server refuses or fails at, and names that are taken."""
    retryable: KubeApiError | None = None
    """The first failure that may pass by itself."""
    written: int = 0
    """Objects that were applied or deleted."""

    @contextmanager
    def recording(self, ref: Ref) -> Iterator[None]:
        """Records how the writing of this object ends. Raises the `KubeApiError` of a server that cannot be reached."""
        with self.reading(ref):
            yield
            self.written += 1

    @contextmanager
    def reading(self, ref: Ref) -> Iterator[None]:
        """Records what keeps this object from being read or written. Raises the `KubeApiError` of a server that cannot
        be reached."""
        try:
            yield
        except NameTakenError as taken:
            self.problems.append(name_conflict(ref, str(taken)))
        except KubeApiError as error:
            if error.status == 0:
                raise
            if error.passing:
                self.retryable = self.retryable or error
            if not error.lasting:
                return
            logger.error("apply_refused", object=str(ref), namespace=ref.namespace, why=str(error))
            self.problems.append(ReconcileProblem(ConditionReason.APPLY_FAILED, str(ref), error.message))


def name_conflict(ref: Ref, owner: str) -> ReconcileProblem:
    """The problem of a name that we need and that is taken. `owner` says whose the object is, in words."""
    message = f"{ref} exists and {owner}: rename one of the two, or delete it"
    return ReconcileProblem(ConditionReason.NAME_CONFLICT, str(ref), message)


class Writer:
    """Carries out plans. `written` remembers what was applied last, for the next plan to compare with.

    `repaired` is called with the kind of each object that someone else had changed or deleted, and that is back.
    """

    def __init__(
        self, client: KubeClient, inventory: Inventory, repaired: Callable[[str], None] = lambda kind: None
    ) -> None:
        self._client = client
        self._inventory = inventory
        self._repaired = repaired
        self.written: dict[Ref, tuple[str, str]] = {}

    async def carry_out(self, plan: Plan, cluster: Cluster, result: ApplyResult) -> None:
        """Applies and deletes, and puts into `result` what becomes of it. An object that the server refuses does not
        keep the others from being written.

        Raises `KubeApiError` when the server cannot be reached.
        """
        for manifest in plan.apply:
            ref = ref_of(manifest)
            with result.recording(ref):
                await self._apply(ref, manifest, await self._current(ref, cluster), cluster)
        for item in plan.delete:
            ref = ref_of(item)
            with result.recording(ref):
                logger.info("deleting", object=str(ref), namespace=ref.namespace)
                await self._client.delete(item)
                self.written.pop(ref, None)

    def forget(self, key: Key) -> None:
        """The cluster is gone: forgets what was written for it."""
        namespace, name = key
        for ref in [ref for ref in self.written if ref.namespace == namespace]:
            item = self._inventory.get(ref.kind, (ref.namespace, ref.name))
            if item is None or owner_of(item) == (namespace, name):
                del self.written[ref]

    async def _current(self, ref: Ref, cluster: Cluster) -> Object | None:
        """The object as it is now, or None. Raises `NameTakenError` (it is someone else's) or `KubeApiError`."""
        current = self._inventory.get(ref.kind, (ref.namespace, ref.name))
        if current is None:
            # One that we have not seen may exist all the same: without our labels, or created a moment ago.
            current = await self._client.get(ref.kind, ref.namespace, ref.name)
            if current is not None and (owner := foreign_owner(current, cluster.uid)) is not None:
                raise NameTakenError(owner)
        return current

    async def _apply(self, ref: Ref, manifest: Object, current: Object | None, cluster: Cluster) -> None:
        replicas = replicas_to_hand_over(manifest, current, _initial_replicas(cluster))
        if replicas is not None:
            if current is None:
                # With its number: the default, 1, would be started before anybody could correct it.
                await self._client.apply({**manifest, "spec": {**manifest["spec"], "replicas": replicas}})
            await self._client.apply(_replicas(manifest, replicas), HANDOVER_MANAGER)
        answer = await self._client.apply(manifest)
        logger.info("applied", object=str(ref), namespace=ref.namespace, new=current is None)
        self._inventory.put(ref.kind, answer)
        if has_drifted(manifest, current, answer, self.written.get(ref)):
            self._repaired(ref.kind.name)
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


class DeletionCosts:
    """Annotates worker pods with their deletion costs, at most every `COST_INTERVAL` seconds for each cluster.

    By them the ReplicaSet controller chooses which pods a scale-down removes: those whose caches are used least.
    """

    def __init__(self, client: KubeClient, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._changed_at: dict[Key, float] = {}

    async def update(self, key: Key, reports: Mapping[str, RouterReport], pods: list[Object]) -> None:
        """Writes the costs that differ. Raises `KubeApiError`, except for a pod that is gone."""
        costs = deletion_costs(reports, pods)
        if len(costs) < 2 or self._clock() - self._changed_at.get(key, float("-inf")) < COST_INTERVAL:
            return
        for pod in pods:
            name, annotations = pod["metadata"]["name"], pod["metadata"].get("annotations") or {}
            cost = costs.get(name)
            if cost is None or annotations.get(ANNOTATION, "0") == str(cost):
                continue
            self._changed_at[key] = self._clock()
            try:
                await self._client.merge(POD, key[0], name, {"metadata": {"annotations": {ANNOTATION: str(cost)}}})
            except KubeApiError as error:
                if error.status != 404:
                    raise

    def forget(self, key: Key) -> None:
        """The cluster is gone."""
        self._changed_at.pop(key, None)
