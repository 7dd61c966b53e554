"""Discovery from an InferencePool at an API server, fake and real: its pods, its ports and its objectives.

Covered: each state of a pod, changes of pool and pods, what is absent. Not covered: cuts and errors of a watch
(test_kubernetes.py, the same reflector), what the router does with the workers (test_shell.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.inference_pool import InferencePoolDiscovery
from router.discovery.objectives import ObjectiveWatch, WithObjectives
from router.discovery.pool_api import find_pool
from router.discovery.pool_objects import Pool, pool_workers, read_pod, read_pool
from router.discovery.sources import StaticDiscovery
from runtime.backoff import Backoff
from runtime.kube.listwatch import ListWatchPolicy
from tests.controller.objects.support import objects
from tests.kube.backends import Backend, granted, used
from tests.kube.conftest import api, client, ns, real_backend  # noqa: F401  fixtures
from tests.kube.gateway_api import (
    POOLS,
    inference_pool,
    install,
    objective_definition,
    pool_definition,
    uninstall,
)
from tests.router.conftest import until

QUICK = ListWatchPolicy(retry=Backoff(0.02, 0.1), settled=0.05, shortest_watch=1, longest_watch=2)
LABELS = {"app": "llama"}


def pod(name: str, address: str | None, *, ready: bool = True, **metadata: object) -> dict[str, Any]:
    status: dict[str, Any] = {"phase": "Running", "conditions": [{"type": "Ready", "status": str(ready)}]}
    return {
        "metadata": {"name": name, "uid": f"u-{name}", **metadata},
        "spec": {"containers": [{"name": "engine", "image": "vllm"}]},
        "status": {**status, **({"podIP": address} if address else {})},
    }


def with_ports(made: dict[str, Any], **ports: int) -> dict[str, Any]:
    declared = [{"name": name.replace("_", "-"), "containerPort": port} for name, port in ports.items()]
    made["spec"]["initContainers"] = [{"name": "agent", "image": "agent", "restartPolicy": "Always", "ports": declared}]
    return made


def workers(*pods: Mapping[str, Any], ports: tuple[int, ...] = (8000,)) -> DiscoveredWorkers:
    return pool_workers(Pool((("app", "llama"),), ports, {}), map(read_pod, pods))


@pytest.mark.parametrize(
    ("made", "intake"),
    [
        pytest.param(pod("a", "10.0.0.1"), Intake.OPEN, id="ready"),
        pytest.param(pod("a", "10.0.0.1", ready=False), Intake.CLOSED, id="not-ready"),
        pytest.param(pod("a", "10.0.0.1", deletionTimestamp="t"), Intake.DRAINING, id="terminating-and-ready"),
        pytest.param(pod("a", "10.0.0.1", ready=False, deletionTimestamp="t"), Intake.CLOSED, id="terminating"),
    ],
)
def test_the_state_of_a_pod_decides_what_its_worker_gets(made: dict[str, Any], intake: Intake) -> None:
    assert workers(made) == {"http://10.0.0.1:8000": DiscoveredWorker(intake, None, "a", "u-a")}


def test_each_target_port_of_each_pod_is_a_worker() -> None:
    found = workers(pod("a", "10.0.0.1"), pod("b", "fd00::1"), pod("c", None), ports=(8000, 8001))
    assert list(found) == [
        "http://10.0.0.1:8000", "http://10.0.0.1:8001", "http://[fd00::1]:8000", "http://[fd00::1]:8001",
    ]  # fmt: skip


def test_feeds_are_where_the_pod_declares_them() -> None:
    made = with_ports(pod("a", "10.0.0.1"), feed=8101, feed_8001=8102)
    found = workers(made, ports=(8000, 8001, 8002))
    assert [each.feed for each in found.values()] == ["http://10.0.0.1:8101", "http://10.0.0.1:8102", None]


def test_a_port_that_serves_its_own_feed_needs_no_other_address() -> None:
    assert workers(with_ports(pod("a", "10.0.0.1"), feed=8000))["http://10.0.0.1:8000"].feed is None


def test_of_two_pods_at_one_address_the_one_that_takes_requests_counts() -> None:
    (found,) = workers(pod("a", "10.0.0.1", ready=False), pod("b", "10.0.0.1")).values()
    assert found.pod == "b"


def test_pods_that_have_ended_are_no_workers() -> None:
    ended = pod("a", "10.0.0.1")
    ended["status"]["phase"] = "Succeeded"
    assert workers(ended) == {}


def test_an_object_that_is_no_pool_is_refused() -> None:
    with pytest.raises(KeyError):
        read_pool({"metadata": {"name": "llama"}, "spec": {"selector": {"matchLabels": LABELS}}})


@dataclass
class Place:
    """A namespace of an API server, and a discovery that follows a pool there."""

    client: httpx.AsyncClient
    namespace: str
    discovery: InferencePoolDiscovery
    told: list[DiscoveredWorkers] = field(default_factory=list)

    async def put_pool(self, labels: dict[str, str], *ports: int, own: dict[str, str] | None = None) -> None:
        """The pool selects pods by `labels`; it has `own` ones."""
        path = f"{POOLS}/namespaces/{self.namespace}/inferencepools/llama"
        pool = inference_pool("llama", labels, *ports)
        pool["metadata"]["labels"] = own or {}
        answer = await self.client.patch(
            path,
            json=pool,
            params={"fieldManager": "test", "force": "true"},
            headers={"content-type": "application/apply-patch+yaml"},
        )
        assert answer.is_success, answer.text

    async def put_pod(self, name: str, address: str, **labels: str) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        container = {"name": "engine", "image": "vllm", "ports": [{"name": "feed", "containerPort": 8101}]}
        spec = {
            "containers": [container], "nodeName": "node-1", "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
        }  # fmt: skip
        made = {"metadata": {"name": name, "labels": labels}, "spec": spec}
        answer = await self.client.post(path, json={"apiVersion": "v1", "kind": "Pod", **made})
        assert answer.is_success, answer.text
        ready = {"type": "Ready", "status": "True"}
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [ready]}
        answer = await self.client.patch(
            f"{path}/{name}/status",
            json={"status": status},
            headers={"content-type": "application/merge-patch+json"},
        )
        assert answer.is_success, answer.text

    async def delete(self, path: str) -> None:
        answer = await self.client.delete(path, params={"gracePeriodSeconds": "0"})
        assert answer.is_success, answer.text

    async def knows(self, *urls: str) -> None:
        await until(lambda: bool(self.told) and list(self.told[-1]) == list(urls))


@asynccontextmanager
async def following(
    tmp_path: Path, backend: Backend, client: httpx.AsyncClient, ns: str, user: str = "admin"  # noqa: F811
) -> AsyncIterator[Place]:  # fmt: skip
    if backend.real:
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
        await client.post(f"/api/v1/namespaces/{ns}/serviceaccounts", json=account)
    path = backend.kubeconfig(tmp_path / "kubeconfig", user, namespace=ns)
    place = Place(
        client,
        ns,
        InferencePoolDiscovery(await find_pool("llama", None, path), policy=QUICK, objectives_policy=QUICK),
    )

    async def follow() -> None:
        async for found in place.discovery.watch():
            place.told.append(found)

    task = asyncio.create_task(follow())
    try:
        yield place
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.process
async def test_pool_ports_selector_and_pods_are_followed_and_workers_that_stay_are_never_away(
    tmp_path: Path, api: Backend, client: httpx.AsyncClient, ns: str  # noqa: F811
) -> None:  # fmt: skip
    async with following(tmp_path, api, client, ns) as place:
        await until(lambda: "inferencepools" in place.discovery.status().error or bool(api.real))
        await install(client, pool_definition())
        await until(lambda: "waits for InferencePool llama" in place.discovery.status().error)
        assert not place.discovery.status().known
        await place.put_pod("a", "10.0.0.1", app="llama", tier="gold")
        await place.put_pod("b", "10.0.0.2", app="llama")
        await place.put_pool(LABELS, 8000)
        await place.knows("http://10.0.0.1:8000", "http://10.0.0.2:8000")
        assert place.told[-1]["http://10.0.0.1:8000"].feed == "http://10.0.0.1:8101"
        assert place.discovery.status().healthy

        await place.put_pool(LABELS, 8000, 8001)
        await place.knows(*(f"http://10.0.0.{pod}:{port}" for pod in (1, 2) for port in (8000, 8001)))
        seen = len(place.told)
        await place.put_pool({"tier": "gold"}, 8000, 8001)
        await place.knows("http://10.0.0.1:8000", "http://10.0.0.1:8001")
        assert all("http://10.0.0.1:8000" in told for told in place.told[seen:])

        await place.put_pod("c", "10.0.0.3", tier="gold")
        await place.delete(f"/api/v1/namespaces/{ns}/pods/a")
        await place.knows("http://10.0.0.3:8000", "http://10.0.0.3:8001")
        await place.delete(f"{POOLS}/namespaces/{ns}/inferencepools/llama")
        await place.knows()
        status = place.discovery.status()
        assert status.known
        assert not status.healthy
        assert "waits for InferencePool llama" in status.error


@pytest.mark.process
async def test_objectives_of_both_groups_are_followed_once_their_crd_is_there(
    tmp_path: Path, api: Backend, client: httpx.AsyncClient, ns: str  # noqa: F811
) -> None:  # fmt: skip
    async def put(
        group: str, name: str, priority: int | None, pool: str = "llama", selector: object = None
    ) -> None:  # fmt: skip
        target = {"poolRef": {"name": pool}} if selector is None else {"poolSelector": selector}
        spec = {**target, **({} if priority is None else {"priority": priority})}
        made = {"apiVersion": f"{group}/v1alpha2", "kind": "InferenceObjective", "metadata": {"name": name}}
        path = f"/apis/{group}/v1alpha2/namespaces/{ns}/inferenceobjectives"
        answer = await client.post(path, json={**made, "spec": spec})
        assert answer.is_success, answer.text

    old, new = "inference.networking.x-k8s.io", "llm-d.ai"
    async with following(tmp_path, api, client, ns) as place:
        priorities = place.discovery.priorities
        await install(client, pool_definition(), objective_definition(old), objective_definition(new))
        await put(old, "batch", -1)
        await put(old, "chat", 1)
        await put(new, "chat", 5)
        await put(new, "plain", None)
        await put(new, "theirs", 9, pool="other")
        await until(lambda: priorities == {"batch": -1, "chat": 5, "plain": 0})
        await put(new, "tier", 7, selector={"matchLabels": {"tier": "gold"}})
        await place.put_pool(LABELS, 8000, own={"tier": "gold"})
        await until(lambda: priorities == {"batch": -1, "chat": 5, "plain": 0, "tier": 7})
        await place.put_pool(LABELS, 8000, own={"tier": "silver"})
        await until(lambda: priorities == {"batch": -1, "chat": 5, "plain": 0})
        await uninstall(client, objective_definition(new))
        await until(lambda: priorities == {"batch": -1, "chat": 1})
        await place.delete(f"/apis/{old}/v1alpha2/namespaces/{ns}/inferenceobjectives/batch")
        await until(lambda: priorities == {"chat": 1})
        await uninstall(client, objective_definition(old))


@pytest.mark.process
async def test_beside_another_source_of_workers_objectives_are_selected_by_the_pools_labels_too(
    tmp_path: Path, api: Backend, client: httpx.AsyncClient, ns: str  # noqa: F811
) -> None:  # fmt: skip
    priorities: dict[str, int] = {}
    path = api.kubeconfig(tmp_path / "kubeconfig", "admin", namespace=ns)
    pool = await find_pool("llama", None, path, setting="--objectives-pool")
    source = WithObjectives(StaticDiscovery(["http://127.0.0.1:1"]), ObjectiveWatch(pool, priorities, policy=QUICK))
    place, watch = Place(client, ns, InferencePoolDiscovery(pool)), source.watch()
    assert list(await anext(watch)) == ["http://127.0.0.1:1"]
    last = asyncio.ensure_future(anext(watch, None))  # the list is static: it only keeps the objectives followed
    await install(client, pool_definition(), objective_definition())
    objective = {
        "apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceObjective", "metadata": {"name": "tier"},
        "spec": {"priority": 7, "poolSelector": {"matchLabels": {"tier": "gold"}}},
    }  # fmt: skip
    answer = await client.post(f"/apis/llm-d.ai/v1alpha2/namespaces/{ns}/inferenceobjectives", json=objective)
    assert answer.is_success, answer.text
    await place.put_pool(LABELS, 8000, own={"tier": "gold"})
    await until(lambda: priorities == {"tier": 7})
    await place.put_pool(LABELS, 8000)
    await until(lambda: priorities == {})
    last.cancel()
    await asyncio.gather(last, return_exceptions=True)
    await watch.aclose()


@pytest.mark.process
async def test_the_role_that_the_operator_gives_is_what_is_asked_for(
    tmp_path: Path, api: Backend, client: httpx.AsyncClient, ns: str  # noqa: F811
) -> None:  # fmt: skip
    gateway = {"inferencePoolRef": {"name": "llama"}}
    made = objects(model={"name": "m"}, engine={"type": "external"}, gateway=gateway)
    rules, user = made["Role/rag-router"]["rules"], f"system:serviceaccount:{ns}:rag-router"
    await install(client, pool_definition(), objective_definition("inference.networking.x-k8s.io"))
    await install(client, objective_definition())
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{ns}"
    binding = {**made["RoleBinding/rag-router"], "metadata": {"name": "rag-router"}}
    binding["subjects"] = [{"kind": "ServiceAccount", "name": "rag-router", "namespace": ns}]
    for plural, item in (("roles", {"metadata": {"name": "rag-router"}, "rules": rules}), ("rolebindings", binding)):
        answer = await client.post(f"{rbac}/{plural}", json=item)
        assert answer.is_success, answer.text
    of_services = {(verb, "discovery.k8s.io", "endpointslices") for verb in ("list", "watch")}
    async with following(tmp_path, api, client, ns, user) as place:
        await place.put_pod("a", "10.0.0.1", app="llama")
        await place.put_pool(LABELS, 8000)
        await place.knows("http://10.0.0.1:8000")
        await until(lambda: used(api.requests, user) == granted(rules) - of_services)
    assert not [each for each in api.requests if each.user == user and each.status == 403]
