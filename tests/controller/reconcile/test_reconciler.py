"""When a KVCluster is reconciled again, that no change is overlooked, and what becomes of a plan that is carried out.

Not covered: what is planned (test_plan) and what the status says (tests/controller/status). The API server is a stub;
tests/kube/operator runs the controller against one that validates and merges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controller.api.model import KVClusterSpec
from controller.kube.kinds import KVCLUSTER, POD, SECRET, Kind, kind_of
from controller.objects.desired import desired_objects
from controller.objects.names import Cluster, Object, Release
from controller.reconcile.inventory import Inventory, Ref
from controller.reconcile.plan import Plan
from controller.reconcile.queue import RetryLater
from controller.reconcile.reconciler import POLL, POLL_UNSETTLED, RECHECK, Reconciler
from controller.reconcile.tokens import SecretTokens
from controller.reconcile.writer import ApplyResult, Writer
from controller.status.observed import RouterReports
from controller.status.reasons import ConditionReason
from controller.status.report import RouterReport
from runtime.kube.errors import KubeApiError

KEY = ("ns", "rag")
START = datetime(2026, 1, 1, tzinfo=UTC)


class Server:
    """An API server that takes everything, and knows no optional kinds until `installed`."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.events: list[str] = []
        self.secrets: dict[str, Object] = {}
        self.installed = False
        self._versions = itertools.count(100)
        self.body: Object = {}

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return self.body if kind == KVCLUSTER else self.secrets.get(name) if kind == SECRET else None

    async def exists(self, kind: Kind) -> bool:
        return self.installed

    async def apply(self, manifest: Object, manager: str = "", subresource: str = "") -> Object:
        name = manifest["metadata"]["name"]
        self.applied.append("status" if subresource else f"{manifest['kind']}/{name}")
        metadata = {"uid": f"{manifest['kind']}-{name}", **manifest["metadata"], "resourceVersion": self.version()}
        if subresource:
            self.body = {**self.body, "status": manifest["status"], "metadata": {**self.body["metadata"], **metadata}}
            return self.body
        return {**manifest, "metadata": {**metadata, "generation": 1}}

    async def create(self, path: str, manifest: Object) -> None:
        """A Secret, or an event of the KVCluster with this uid."""
        if manifest["kind"] == "Secret":
            self.applied.append(f"Secret/{manifest['metadata']['name']}")
            self.secrets[manifest["metadata"]["name"]] = manifest
            return
        self.events.append(manifest["involvedObject"]["uid"])

    def version(self) -> str:
        return str(next(self._versions))


class Routers:
    """What the routers say."""

    def __init__(self) -> None:
        self.report = RouterReport("cache_aware", 1, 1, 1, view_age_seconds=0.5)

    async def collect(self, pods: Iterable[Object]) -> RouterReports:
        return RouterReports(
            {pod["metadata"]["name"]: self.report for pod in pods if "router" in pod["metadata"]["name"]}
        )


class World:
    """One KVCluster, its objects, and the reconciler."""

    def __init__(self, **spec: Any) -> None:
        self.now = 0.0
        self.repaired: list[str] = []
        """Kinds of the objects that were brought back to what had been applied."""
        self.server, self.inventory, self.routers = Server(), Inventory(), Routers()
        metadata = {"name": "rag", "namespace": "ns", "uid": "u", "generation": 1, "resourceVersion": "1"}
        self.server.body = {
            "apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": metadata, "spec": spec
        }  # fmt: skip
        self.inventory.put(KVCLUSTER, self.server.body)
        self.restart()

    def restart(self) -> None:
        """A reconciler that knows nothing but the inventory."""
        self.reconciler = Reconciler(
            self.server,  # type: ignore[arg-type]
            self.inventory,
            Release("image"),
            self.routers,  # type: ignore[arg-type]
            clock=lambda: self.now,
            now=lambda: START + timedelta(seconds=self.now),
            instance="me",
            secrets=SecretTokens(self.server, lambda: self.now),  # type: ignore[arg-type]
            repaired=self.repaired.append,
        )

    async def reconcile(self) -> float | None:
        self.server.applied.clear()
        return await self.reconciler.reconcile(KEY)

    async def at_rest(self) -> float | None:
        """Reconciles until nothing is written."""
        for _ in range(5):
            pause = await self.reconcile()
            if not self.server.applied:
                return pause
        raise AssertionError(self.server.applied)

    def pod(self, component: str, *, ready: bool = True) -> None:
        labels = {"app.kubernetes.io/instance": "rag", "app.kubernetes.io/component": component}
        conditions = [{"type": "Ready", "status": str(ready), "lastTransitionTime": "2025-12-31T00:00:00Z"}]
        metadata = {"name": f"rag-{component}-1", "namespace": "ns", "uid": component, "labels": labels}
        status = {"phase": "Running", "podIP": "127.0.0.1", "conditions": conditions}
        self.inventory.put(POD, {"metadata": {**metadata, "resourceVersion": self.server.version()}, "status": status})

    def available(self) -> None:
        """The Deployments say that all is well."""
        for component in ("worker", "router"):
            ref = next(ref for ref, _ in self.inventory.owned(KEY) if str(ref) == f"Deployment/rag-{component}")
            item = self.inventory.get(ref.kind, (ref.namespace, ref.name))
            assert item is not None
            counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
            metadata = {**item["metadata"], "resourceVersion": self.server.version()}
            self.inventory.put(ref.kind, {**item, "metadata": metadata, "status": {**counts, "observedGeneration": 1}})

    def change(self, name: str, **fields: Any) -> None:
        """Somebody changes an object by hand."""
        ref, item = next((ref, item) for ref, item in self.inventory.owned(KEY) if str(ref) == name)
        metadata = {**item["metadata"], "resourceVersion": self.server.version()}
        self.inventory.put(ref.kind, {**item, **fields, "metadata": metadata})


async def test_a_cluster_without_pods_waits_for_an_event():
    world = World()
    assert await world.at_rest() is None
    assert await World(workers={"replicas": -1}).at_rest() is None, "a spec that is refused too"


async def test_a_cluster_with_pods_is_reconciled_from_time_to_time():
    world = World()
    await world.at_rest()
    world.pod("worker", ready=False)
    assert await world.at_rest() == POLL, "nobody can be asked yet"
    world.pod("worker")
    world.pod("router")
    world.available()
    assert await world.at_rest() == POLL
    world.routers.report = RouterReport("cache_aware", 1, 1, 1, view_age_seconds=60.0)
    assert await world.at_rest() == POLL_UNSETTLED, "a stale view is expected to become fresh"


async def test_what_has_not_changed_is_not_planned_anew(monkeypatch: pytest.MonkeyPatch):
    world, planned = World(), list[str]()

    def counted(cluster: Cluster) -> tuple[Object, ...]:
        planned.append(cluster.name)
        return desired_objects(cluster)

    monkeypatch.setattr("controller.reconcile.reconciler.desired_objects", counted)
    await world.at_rest()
    await world.reconcile()
    planned.clear()
    await world.reconcile()
    assert planned == []
    world.change("ConfigMap/rag-worker", data={})
    await world.reconcile()
    assert planned == ["rag"]
    await world.at_rest()
    planned.clear()
    world.now += RECHECK + 1
    await world.reconcile()
    assert planned == ["rag"]


async def test_a_change_by_hand_is_undone_at_the_next_reconciliation():
    world = World()
    await world.at_rest()
    world.change("ConfigMap/rag-worker", data={})
    assert world.repaired == [], "what is new has not drifted"
    await world.reconcile()
    assert "ConfigMap/rag-worker" in world.server.applied
    assert world.repaired == ["ConfigMap"]
    await world.at_rest()
    gone = world.inventory.get(kind_of({"apiVersion": "v1", "kind": "ConfigMap"}), ("ns", "rag-router"))
    assert gone is not None
    world.inventory.drop(kind_of(gone), gone)
    await world.reconcile()
    assert "ConfigMap/rag-router" in world.server.applied
    await world.at_rest()
    assert world.repaired == ["ConfigMap"] * 2


async def test_what_is_applied_once_more_after_a_start_has_not_drifted(monkeypatch: pytest.MonkeyPatch):
    """The server stores values in a form of its own, and a controller that has just started does not know that."""
    world = World()
    apply = world.server.apply

    async def normalise(manifest: Object, manager: str = "", subresource: str = "") -> Object:
        answer = await apply(manifest, manager, subresource)
        if manifest["kind"] != "ConfigMap":
            return answer
        return {**answer, "data": {name: f"{value} " for name, value in manifest["data"].items()}}

    monkeypatch.setattr(world.server, "apply", normalise)
    await world.at_rest()
    world.restart()
    await world.reconcile()
    assert "ConfigMap/rag-worker" in world.server.applied
    assert world.repaired == []
    world.restart()
    world.change("ConfigMap/rag-worker", data={})
    await world.reconcile()
    assert world.repaired == ["ConfigMap"], "the object itself says what had been applied to it"


async def test_a_changed_spec_is_followed():
    world = World()
    await world.at_rest()
    metadata = {**world.server.body["metadata"], "generation": 2, "resourceVersion": world.server.version()}
    world.server.body = {**world.server.body, "metadata": metadata, "spec": {"workers": {"replicas": 4}}}
    world.inventory.put(KVCLUSTER, world.server.body)
    await world.reconcile()
    assert "Deployment/rag-worker" in world.server.applied
    assert world.repaired == []


async def test_the_token_of_the_management_port_is_there_before_the_pods_that_mount_it():
    world, secret = World(), "Secret/rag-router-management"
    await world.reconcile()
    applied = world.server.applied
    assert applied.index(secret) < applied.index("Deployment/rag-router")
    first = world.server.secrets["rag-router-management"]
    await world.at_rest()
    del world.server.secrets["rag-router-management"]
    world.now += RECHECK + 1
    await world.reconcile()
    assert world.server.applied == [secret], "one that is deleted is made again"
    assert world.server.secrets["rag-router-management"]["data"] != first["data"]


async def test_no_token_is_made_where_none_is_asked_for():
    world = World(router={"management": {"auth": "none"}})
    await world.at_rest()
    assert world.server.secrets == {}


async def test_no_token_is_made_for_a_cluster_that_is_gone():
    world = World()
    await world.at_rest()
    world.server.secrets.clear()
    world.server.body = {**world.server.body, "metadata": {**world.server.body["metadata"], "uid": "next"}}
    world.now += RECHECK + 1
    assert await world.reconcile() is None
    assert world.server.secrets == {}


async def test_a_right_on_secrets_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch):
    world, get = World(), Server.get

    async def fail(kind: Kind, namespace: str, name: str) -> Object | None:
        if kind == SECRET:
            raise KubeApiError(403, "Forbidden", "cannot get resource secrets")
        return await get(world.server, kind, namespace, name)

    monkeypatch.setattr(world.server, "get", fail)
    with pytest.raises(RetryLater, match="Secret/rag-router-management: cannot get resource secrets"):
        await world.reconcile()
    assert "Deployment/rag-router" in world.server.applied, "old routers go on until the new ones have their Secret"


async def test_an_api_that_is_installed_later_is_noticed():
    world = World(monitoring={"podMonitor": True})
    assert await world.at_rest() == RECHECK
    world.server.installed = True
    world.now += RECHECK + 1
    await world.reconcile()
    assert "PodMonitor/rag-router" in world.server.applied


async def test_a_cluster_that_is_gone_is_forgotten():
    world = World()
    await world.at_rest()
    world.inventory.drop(KVCLUSTER, world.server.body)
    assert await world.reconcile() is None
    assert world.inventory.revision(KEY) == 0
    assert Ref(KVCLUSTER, *KEY) not in {ref for ref, _ in world.inventory.owned(KEY)}


async def test_pending_events_of_a_deleted_cluster_are_dropped(monkeypatch: pytest.MonkeyPatch):
    world = World()

    async def fail(path: str, manifest: Object) -> None:
        raise KubeApiError(503, "No", "not now")

    monkeypatch.setattr(world.server, "create", fail)
    with pytest.raises(Exception, match="not now"):
        await world.reconcile()
    monkeypatch.undo()
    world.inventory.drop(KVCLUSTER, world.server.body)
    assert await world.reconcile() is None
    metadata = {**world.server.body["metadata"], "uid": "next", "resourceVersion": world.server.version()}
    world.server.body = {**world.server.body, "status": {}, "metadata": metadata}
    world.inventory.put(KVCLUSTER, world.server.body)
    await world.reconcile()
    assert set(world.server.events) == {"next"}


@pytest.mark.parametrize("status", [0, 503])
async def test_a_server_that_fails_is_tried_again(status: int, monkeypatch: pytest.MonkeyPatch):
    world = World()

    async def fail(*_: Any, **__: Any) -> None:
        raise KubeApiError(status, "No", "not now")

    monkeypatch.setattr(world.server, "apply", fail)
    with pytest.raises(Exception, match="not now"):
        await world.reconcile()
    monkeypatch.undo()
    assert await world.at_rest() is None


# --- what becomes of a plan ---

CLUSTER = Cluster("rag", "ns", "u", KVClusterSpec(), Release("image"))


class Taken:
    """Has objects of someone else's under these names, and takes everything that is applied."""

    def __init__(self, *taken: str) -> None:
        self._taken = taken

    async def get(self, kind: Any, namespace: str, name: str) -> dict[str, Any] | None:
        metadata = {"name": name, "namespace": namespace, "uid": "theirs", "resourceVersion": "1"}
        return {"metadata": metadata} if f"{kind.name}/{name}" in self._taken else None

    async def apply(self, manifest: dict[str, Any], manager: str = "") -> dict[str, Any]:
        return {**manifest, "metadata": {**manifest["metadata"], "uid": "ours", "resourceVersion": "2"}}


async def outcome(server: Taken):  # type: ignore[no-untyped-def]
    plan = Plan(apply=tuple(item for item in desired_objects(CLUSTER) if item["kind"] == "ConfigMap"))
    result = ApplyResult()
    await Writer(server, Inventory()).carry_out(plan, CLUSTER, result)  # type: ignore[arg-type]
    return result


async def test_a_name_that_is_taken_is_no_progress():
    result = await outcome(Taken("ConfigMap/rag-worker"))
    assert result.written == 1
    (problem,) = result.problems
    assert (problem.reason, problem.object) == (ConditionReason.NAME_CONFLICT, "ConfigMap/rag-worker")
    assert "belongs to no KVCluster" in problem.message
    assert (await outcome(Taken())).written == 2
