"""Reconciles one KVCluster: from what was observed to what is written. Idempotent: what it remembers, it can observe
again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime

from controller.api.load import validate_manifest
from controller.api.model import EngineType
from controller.api.problems import ManifestError
from controller.kube.client import KubeClient
from controller.kube.kinds import (
    DEPLOYMENT,
    HPA,
    INFERENCE_POOL,
    INGRESS,
    KVCLUSTER,
    POD,
    SCALED_OBJECT,
    SERVICE,
    Kind,
    kind_of,
)
from controller.objects.desired import desired_objects
from controller.objects.management import build_management_secret
from controller.objects.names import Cluster, Component, Object, Release
from controller.reconcile.events import EventRecorder
from controller.reconcile.inventory import Inventory, Key
from controller.reconcile.plan import Plan, foreign_owner, plan, ref_of
from controller.reconcile.queue import RetryLater
from controller.reconcile.reports import ReportCollector
from controller.reconcile.tokens import SecretTokens
from controller.reconcile.writer import ApplyResult, DeletionCosts, Writer, name_conflict
from controller.status.compute import compute
from controller.status.observed import Observed, ReconcileProblem, RouterReports
from controller.status.raw import is_terminating, text
from controller.status.reasons import ConditionReason
from controller.status.transitions import events
from runtime.kube.errors import KubeApiError

POLL = 10.0
"""Seconds until a cluster that has pods is reconciled again without an event: its routers are asked for their reports,
and the past failures of its pods expire. A cluster without pods waits for an event."""
POLL_UNSETTLED = 2.0
"""The same while it is progressing or the view of a cache is not fresh, and a router can be asked."""
RECHECK = 60.0
"""Default of the seconds for which the list of optional APIs counts, and after which an unchanged cluster is planned
anew."""
CONFLICT_RETRY = 5.0
"""Seconds until a name that is taken is tried again: its owner may be on its way out."""


@dataclass(frozen=True, slots=True)
class _InSync:
    """The last plan of a cluster had nothing to write and met no problem."""

    cluster: Cluster
    revision: int
    """Of the inventory, for this cluster."""
    at: float


@dataclass(eq=False)
class Reconciler:
    """Brings KVClusters and their statuses up to date.

    `now` gives aware times; `instance` names this process; `secrets` makes those with the tokens of the routers'
    management ports; `repaired` is called with the kind of each object that was
    brought back to what had been applied before.
    """

    client: KubeClient
    inventory: Inventory
    release: Release
    collector: ReportCollector
    _: KW_ONLY
    clock: Callable[[], float]
    now: Callable[[], datetime]
    instance: str
    secrets: SecretTokens
    repaired: Callable[[str], None] = lambda kind: None
    recheck: float = RECHECK
    _in_sync: dict[Key, _InSync] = field(default_factory=dict, init=False)
    _events: EventRecorder = field(init=False)
    _apis: OptionalApis = field(init=False)
    _writer: Writer = field(init=False)
    _costs: DeletionCosts = field(init=False)

    def __post_init__(self) -> None:
        self._events = EventRecorder(self.client, self.now, self.instance)
        self._apis = OptionalApis(self.client, self.clock, self.recheck)
        self._writer = Writer(self.client, self.inventory, self.repaired)
        self._costs = DeletionCosts(self.client, self.clock)

    async def reconcile(self, key: Key) -> float | None:
        """Seconds until this cluster is to be reconciled again, None: not before an event. Raises `RetryLater`.

        A cluster must not be reconciled twice at the same time.
        """
        body = self.inventory.get(KVCLUSTER, key)
        if body is None or is_terminating(body):
            # Its objects name it as their owner: the garbage collector deletes them, whether we run or not.
            self._forget(key)
            return None
        try:
            return await self._reconcile(key, body)
        except KubeApiError as error:
            raise RetryLater(str(error), error.retry_after, logged=error.status == 0) from None

    def _forget(self, key: Key) -> None:
        self._writer.forget(key)
        self._costs.forget(key)
        self._events.forget(key)
        self.inventory.forget(key)
        self.secrets.forget(key)
        self._in_sync.pop(key, None)

    async def _reconcile(self, key: Key, body: Object) -> float | None:
        revision, now = self.inventory.revision(key), self.clock()
        known = self._in_sync.get(key)
        if known is not None and known.revision == revision and now - known.at < self.recheck:
            return await self._report(key, body, known.cluster, [])
        cluster, problems = self._parse(body)
        result = ApplyResult()
        if cluster is not None:
            todo = await self._plan(key, cluster)
            secret = await self._missing_secret(cluster, result)
            if (todo.create or secret is not None) and not await self._still_exists(key, body):
                return None
            if secret is not None:  # before the pods that mount it
                with result.recording(ref_of(secret)):
                    await self.secrets.create(secret)
            await self._writer.carry_out(todo, cluster, result)
            problems += [*result.problems, *_problems_of(todo)]
            if todo == Plan() and not problems and result.retryable is None:
                self._in_sync[key] = _InSync(cluster, revision, now)
        pause = await self._report(key, body, cluster, problems)
        if (error := result.retryable) is not None:
            raise RetryLater(str(error), error.retry_after, progress=result.written > 0)
        reasons = {problem.reason for problem in problems}
        if ConditionReason.APPLY_FAILED in reasons:
            raise RetryLater("; ".join(f"{problem.object}: {problem.message}" for problem in problems))
        if ConditionReason.NAME_CONFLICT in reasons:
            return CONFLICT_RETRY
        return pause if ConditionReason.MISSING_API not in reasons else min(pause or self.recheck, self.recheck)

    def _parse(self, body: Object) -> tuple[Cluster | None, list[ReconcileProblem]]:
        metadata = body["metadata"]
        try:
            manifest = validate_manifest(body)
        except ManifestError as error:
            reason = ConditionReason.INVALID_SPEC
            return None, [ReconcileProblem(reason, found.path, found.message) for found in error.problems]
        return Cluster(metadata["name"], metadata["namespace"], metadata["uid"], manifest.spec, self.release), []

    async def _plan(self, key: Key, cluster: Cluster) -> Plan:
        desired = desired_objects(cluster)
        absent = await self._apis.absent({kind_of(manifest) for manifest in desired})
        live = {ref: item for ref, item in self.inventory.owned(key) if ref.kind != POD}
        return plan(cluster.uid, desired, live, self._writer.written, absent)

    async def _missing_secret(self, cluster: Cluster, result: ApplyResult) -> Object | None:
        """The Secret that is to be made, if any. What keeps us from knowing is put into `result`."""
        wanted = build_management_secret(cluster)
        if wanted is None:
            return None
        missing = False
        with result.reading(ref_of(wanted)):
            missing = await self.secrets.is_missing(wanted)
        return wanted if missing else None

    async def _still_exists(self, key: Key, body: Object) -> bool:
        """Whether the KVCluster exists as we know it, asked at the server: its objects may be gone because it is, and
        two watches are not ordered. Nothing is created for a KVCluster that is gone."""
        found = await self.client.get(KVCLUSTER, *key)
        if found is not None:
            self.inventory.put(KVCLUSTER, found)
            return bool(found["metadata"]["uid"] == body["metadata"]["uid"] and not is_terminating(found))
        self.inventory.drop(KVCLUSTER, body)
        return False

    async def _report(
        self, key: Key, body: Object, cluster: Cluster | None, problems: list[ReconcileProblem]
    ) -> float | None:
        """Writes the status and events about its changes. Seconds until there may be more to report; None: after an
        event."""
        pods = [item for ref, item in self.inventory.owned(key) if ref.kind == POD]
        answers = await self.collector.collect(pods)
        before = body.get("status")
        pool = await self._foreign_pool(cluster)
        status = compute(self._observed(key, body, cluster, problems, pods, answers, pool), before, self.now())
        if status != before:
            answer = await self.client.apply({**_identity(body), "status": status}, subresource="status")
            self.inventory.put(KVCLUSTER, answer)
            self._events.record(body, events(before, status))
        await self._costs.update(key, answers.reports, pods)
        await self._events.flush(key)
        if not pods:
            return None
        return POLL if _is_settled(status) or not answers.asked else POLL_UNSETTLED

    async def _foreign_pool(self, cluster: Cluster | None) -> Object | None:
        """The InferencePool that the spec refers to and somebody else owns. It has none of our labels, by which objects
        are watched."""
        reference = cluster.spec.gateway.inference_pool_ref if cluster is not None else None
        if cluster is None or reference is None:
            return None
        return await self.client.get(INFERENCE_POOL, cluster.namespace, reference.name)

    def _observed(
        self,
        key: Key,
        body: Object,
        cluster: Cluster | None,
        problems: list[ReconcileProblem],
        pods: list[Object],
        answers: RouterReports,
        foreign_pool: Object | None,
    ) -> Observed:
        namespace, name = key

        def ours(kind: Kind, component: Component) -> Object | None:
            item = self.inventory.get(kind, (namespace, f"{name}-{component}"))
            return item if item is not None and foreign_owner(item, body["metadata"]["uid"]) is None else None

        spec = None if cluster is None else cluster.spec
        return Observed(
            name=name,
            namespace=namespace,
            generation=body["metadata"]["generation"],
            spec=spec,
            deployments={component.value: ours(DEPLOYMENT, component) for component in Component},
            pods=tuple(pods),
            routers=answers,
            autoscaler=ours(HPA, Component.WORKER) or ours(SCALED_OBJECT, Component.WORKER),
            problems=tuple(problems),
            service=ours(SERVICE, Component.ROUTER),
            ingress=ours(INGRESS, Component.ROUTER),
            pool=foreign_pool or ours(INFERENCE_POOL, Component.WORKER),
            external=text(body, "spec", "engine", "type") == EngineType.EXTERNAL,
            workers_wanted=None if spec is None or spec.autoscaling is not None else spec.workers.replicas,
        )


def _identity(body: Object) -> Object:
    """What names the object in an apply. With its uid, so that a later object of the same name is left alone."""
    metadata = body["metadata"]
    return {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
    }


def _problems_of(todo: Plan) -> list[ReconcileProblem]:
    taken = [name_conflict(ref, owner) for ref, owner in todo.conflicts]
    missing = [
        ReconcileProblem(
            ConditionReason.MISSING_API, str(ref), f"this cluster has no {ref.kind.api_version} {ref.kind.name}"
        )
        for ref in todo.missing
    ]
    return taken + missing


def _is_settled(status: Object) -> bool:
    """Whether nothing is expected to change by itself soon."""
    statuses = {condition["type"]: condition["status"] for condition in status["conditions"]}
    return statuses.get("Progressing") != "True" and statuses.get("CacheViewFresh") != "False"


class OptionalApis:
    """Which optional kinds the API server knows. An answer counts for `recheck` seconds, so that a CRD that is
    installed later is noticed."""

    def __init__(self, client: KubeClient, clock: Callable[[], float], recheck: float) -> None:
        self._client = client
        self._clock = clock
        self._recheck = recheck
        self._known: dict[Kind, tuple[float, bool]] = {}

    async def absent(self, kinds: Iterable[Kind]) -> set[Kind]:
        """Those of the kinds that the API server does not know. Raises `KubeApiError`."""
        return {kind for kind in kinds if kind.optional and not await self._exists(kind)}

    async def _exists(self, kind: Kind) -> bool:
        asked_at, exists = self._known.get(kind, (float("-inf"), False))
        if self._clock() - asked_at > self._recheck:
            exists = await self._client.exists(kind)
            self._known[kind] = (self._clock(), exists)
        return exists
