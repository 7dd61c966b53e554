"""One look at one KVCluster: from what is seen to what is written. Idempotent: what it knows, it can see again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from controller.api.load import validate_manifest
from controller.api.problems import ManifestError
from controller.kube.client import ApiError, KubeClient
from controller.kube.kinds import DEPLOYMENT, HPA, INGRESS, KVCLUSTER, POD, SCALED_OBJECT, SERVICE, Kind, kind_of
from controller.objects.desired import desired_objects
from controller.objects.names import Cluster, Component, Object, Release
from controller.reconcile.announce import Announcer
from controller.reconcile.inventory import Inventory, Key
from controller.reconcile.plan import Plan, foreign_owner, leaving, plan
from controller.reconcile.queue import RetryLater
from controller.reconcile.reports import RouterAsker
from controller.reconcile.writer import DeletionCosts, Outcome, Writer, name_conflict
from controller.status.compute import compute
from controller.status.observed import Observed, ReconcileProblem
from controller.status.reasons import ConditionReason
from controller.status.report import RouterReport
from controller.status.transitions import events

POLL = 10.0
"""Seconds between two looks at a cluster that has pods, and that nothing happens to: its routers are asked how things
are, and a pod's past is forgiven with time. A cluster without pods waits for an event."""
POLL_UNSETTLED = 2.0
"""The same while something is about to change, or the caches' view is not fresh, and a router can be asked."""
RECHECK = 60.0
"""Seconds after which what depends on more than the cluster's own objects is looked at again: which APIs there are."""
CONFLICT_RETRY = 5.0
"""Seconds after which a taken name is tried again: its owner may be on its way out."""


@dataclass(frozen=True, slots=True)
class _InOrder:
    """A look that found nothing to write and no problem."""

    cluster: Cluster
    revision: int
    """Of the inventory, for this cluster."""
    at: float


class Reconciler:
    """Looks after KVClusters, one at a time each. `now` gives aware times; `instance` names this process in events."""

    def __init__(
        self,
        client: KubeClient,
        inventory: Inventory,
        release: Release,
        asker: RouterAsker,
        *,
        clock: Callable[[], float],
        now: Callable[[], datetime],
        instance: str,
    ) -> None:
        self._client = client
        self._inventory = inventory
        self._release = release
        self._asker = asker
        self._clock = clock
        self._now = now
        self._in_order: dict[Key, _InOrder] = {}
        self._announcer = Announcer(client, now, instance)
        self._apis = OptionalApis(client, clock)
        self._writer = Writer(client, inventory)
        self._costs = DeletionCosts(client, clock)

    async def reconcile(self, key: Key) -> float | None:
        """Seconds after which to look again; None: when something happens. Raises `RetryLater`."""
        body = self._inventory.get(KVCLUSTER, key)
        if body is None or leaving(body):
            # Its objects name it as their owner: the garbage collector ends them, whether we run or not.
            self._writer.forget(key)
            self._costs.forget(key)
            self._announcer.forget(key)
            self._inventory.forget(key)
            self._in_order.pop(key, None)
            return None
        try:
            return await self._look(key, body)
        except ApiError as error:
            raise RetryLater(str(error), error.retry_after, said=error.status == 0) from None

    async def _look(self, key: Key, body: Object) -> float | None:
        revision, now = self._inventory.revision(key), self._clock()
        known = self._in_order.get(key)
        if known is not None and known.revision == revision and now - known.at < RECHECK:
            return await self._report(key, body, known.cluster, [])
        cluster, problems = self._read(body)
        outcome = Outcome()
        if cluster is not None:
            todo = await self._plan(key, cluster)
            if todo.create and not await self._still_there(key, body):
                return None
            outcome = await self._writer.carry_out(todo, cluster)
            problems += [*outcome.problems, *_obstacles(todo)]
            if todo == Plan() and not problems:
                self._in_order[key] = _InOrder(cluster, revision, now)
        pause = await self._report(key, body, cluster, problems)
        if (error := outcome.postponed) is not None:
            raise RetryLater(str(error), error.retry_after, progress=outcome.done > 0)
        reasons = {problem.reason for problem in problems}
        if ConditionReason.APPLY_FAILED in reasons:
            raise RetryLater("; ".join(f"{problem.object}: {problem.message}" for problem in problems))
        if ConditionReason.NAME_CONFLICT in reasons:
            return CONFLICT_RETRY
        return pause if ConditionReason.MISSING_API not in reasons else min(pause or RECHECK, RECHECK)

    def _read(self, body: Object) -> tuple[Cluster | None, list[ReconcileProblem]]:
        metadata = body["metadata"]
        try:
            manifest = validate_manifest(body)
        except ManifestError as error:
            return None, [
                ReconcileProblem(ConditionReason.INVALID_SPEC, found.path, found.message) for found in error.problems
            ]
        return Cluster(metadata["name"], metadata["namespace"], metadata["uid"], manifest.spec, self._release), []

    async def _plan(self, key: Key, cluster: Cluster) -> Plan:
        desired = desired_objects(cluster)
        absent = await self._apis.absent({kind_of(manifest) for manifest in desired})
        live = {ref: item for ref, item in self._inventory.owned(key) if ref.kind != POD}
        return plan(cluster.uid, desired, live, self._writer.written, absent)

    async def _still_there(self, key: Key, body: Object) -> bool:
        """Whether the KVCluster exists as we know it: its objects may have gone because it has, and the watches of the
        two are not told in order. Nothing is made for a KVCluster that is gone."""
        found = await self._client.get(KVCLUSTER, *key)
        if found is not None:
            self._inventory.put(KVCLUSTER, found)
            return bool(found["metadata"]["uid"] == body["metadata"]["uid"] and not leaving(found))
        self._inventory.drop(KVCLUSTER, body)
        return False

    async def _report(
        self, key: Key, body: Object, cluster: Cluster | None, problems: list[ReconcileProblem]
    ) -> float | None:
        """Writes the status and tells of what changed in it; seconds after which there may be more to tell."""
        pods = [item for ref, item in self._inventory.owned(key) if ref.kind == POD]
        reports = await self._asker.ask(pods)
        before = body.get("status")
        status = compute(self._observed(key, body, cluster, problems, pods, reports), before, self._now())
        if status != before:
            answer = await self._client.apply({**_identity(body), "status": status}, subresource="status")
            self._inventory.put(KVCLUSTER, answer)
            self._announcer.add(body, events(before, status))
        await self._costs.update(key, reports, pods)
        await self._announcer.tell(key)
        if not pods:
            return None
        return POLL if _settled(status) or not reports else POLL_UNSETTLED

    def _observed(
        self,
        key: Key,
        body: Object,
        cluster: Cluster | None,
        problems: list[ReconcileProblem],
        pods: list[Object],
        reports: Mapping[str, RouterReport | str],
    ) -> Observed:
        namespace, name = key

        def ours(kind: Kind, component: Component) -> Object | None:
            item = self._inventory.get(kind, (namespace, f"{name}-{component}"))
            return item if item is not None and foreign_owner(item, body["metadata"]["uid"]) is None else None

        spec = None if cluster is None else cluster.spec
        return Observed(
            name=name,
            namespace=namespace,
            generation=body["metadata"]["generation"],
            spec=spec,
            deployments={component.value: ours(DEPLOYMENT, component) for component in Component},
            pods=tuple(pods),
            reports=reports,
            autoscaler=ours(HPA, Component.WORKER) or ours(SCALED_OBJECT, Component.WORKER),
            problems=tuple(problems),
            service=ours(SERVICE, Component.ROUTER),
            ingress=ours(INGRESS, Component.ROUTER),
            workers_wanted=None if spec is None or spec.autoscaling is not None else spec.workers.replicas,
        )


def _identity(body: Object) -> Object:
    """What names the object in an apply: with its uid, so that a later one of the same name gets none of it."""
    metadata = body["metadata"]
    return {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
    }


def _obstacles(todo: Plan) -> list[ReconcileProblem]:
    taken = [name_conflict(ref, owner) for ref, owner in todo.conflicts]
    missing = [
        ReconcileProblem(
            ConditionReason.MISSING_API, str(ref), f"this cluster has no {ref.kind.api_version} {ref.kind.name}"
        )
        for ref in todo.missing
    ]
    return taken + missing


def _settled(status: Object) -> bool:
    """Whether nothing is expected to change by itself soon."""
    truth = {condition["type"]: condition["status"] for condition in status["conditions"]}
    return truth.get("Progressing") != "True" and truth.get("CacheViewFresh") != "False"


AGE = 60.0
"""Seconds for which an answer counts: a CRD that is installed later is noticed within this time."""


class OptionalApis:
    """Answers, as old as `AGE` at most."""

    def __init__(self, client: KubeClient, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._known: dict[Kind, tuple[float, bool]] = {}

    async def absent(self, kinds: Iterable[Kind]) -> set[Kind]:
        """Those that do not exist here. Raises `ApiError`."""
        return {kind for kind in kinds if kind.optional and not await self._exists(kind)}

    async def _exists(self, kind: Kind) -> bool:
        asked_at, exists = self._known.get(kind, (float("-inf"), False))
        if self._clock() - asked_at > AGE:
            exists = await self._client.exists(kind)
            self._known[kind] = (self._clock(), exists)
        return exists
