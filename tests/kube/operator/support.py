"""What the operator's tests do to an API server, as a person with kubectl would."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from controller.api.crd import crd
from tests.kube.apiserver import FakeApiServer
from tests.kube.backends import Backend, FakeBackend
from tests.processes import eventually

Object = dict[str, Any]

ROOT = Path(__file__).parents[3]
NAMESPACE = "serving"
OPERATOR = "system:serviceaccount:system:controller"
IMAGE = "kvcluster:test"
OBJECTS = frozenset(
    {
        *("serviceaccounts/rag-router", "roles/rag-router", "rolebindings/rag-router", "configmaps/rag-router"),
        *("configmaps/rag-worker", "services/rag-worker", "services/rag-router", "services/rag-router-management"),
        *("poddisruptionbudgets/rag-router", "poddisruptionbudgets/rag-worker"),
        *("deployments/rag-worker", "deployments/rag-router", "secrets/rag-router-management"),
    }
)
"""What every KVCluster called rag has."""
COLLECTED_WITHIN = 90.0
"""Seconds after which garbage is gone: a real collector looks for kinds it does not know every 30 seconds."""

_GROUPS: Mapping[str, str] = {
    "kvclusters": "apis/kvcluster.dev/v1alpha1",
    "deployments": "apis/apps/v1",
    "roles": "apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "apis/rbac.authorization.k8s.io/v1",
    "poddisruptionbudgets": "apis/policy/v1",
    "horizontalpodautoscalers": "apis/autoscaling/v2",
    "networkpolicies": "apis/networking.k8s.io/v1",
    "inferencepools": "apis/inference.networking.k8s.io/v1",
    "httproutes": "apis/gateway.networking.k8s.io/v1",
}
_OPTIONAL = ("kvclusters", "inferencepools", "httproutes")
_OWNED = (
    "serviceaccounts",
    "configmaps",
    "secrets",
    "services",
    *(plural for plural in _GROUPS if plural not in _OPTIONAL),
)
MERGE = {"content-type": "application/merge-patch+json"}
APPLY = {"content-type": "application/apply-patch+yaml"}


class Cluster:
    """One namespace of an API server, and what is in it."""

    def __init__(self, backend: Backend, client: httpx.AsyncClient, namespace: str = NAMESPACE) -> None:
        self.backend = backend
        self.operator = OPERATOR
        self.namespace = namespace
        self._client = client

    @property
    def server(self) -> FakeApiServer:
        """The fake server, for its faults."""
        return self.backend.fake

    def operator_kubeconfig(self, path: Path) -> Path:
        """What the operator logs in with."""
        return self.backend.kubeconfig(path, OPERATOR)

    async def prepare(self) -> None:
        """The CRD, two namespaces, and an operator that may do anything. A real server may have them already."""
        definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        await self._provide(definitions, crd())
        for name in (self.namespace, "system"):
            await self._provide("/api/v1/namespaces", _namespace(name))

        async def served() -> bool:
            return (await self._client.get(self.path("kvclusters"))).is_success

        await eventually(served, "KVClusters are served")
        rbac = "/apis/rbac.authorization.k8s.io/v1"
        rules = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
        head = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "operator"}}
        await self._provide(f"{rbac}/clusterroles", {**head, "kind": "ClusterRole", "rules": rules})
        subject = {"kind": "ServiceAccount", "name": "controller", "namespace": "system"}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "operator"}
        binding = {**head, "kind": "ClusterRoleBinding", "roleRef": reference, "subjects": [subject]}
        await self._provide(f"{rbac}/clusterrolebindings", binding)

    async def add_namespace(self, name: str) -> Cluster:
        """A namespace of its own on the same server."""
        await self._post("/api/v1/namespaces", _namespace(name))
        return Cluster(self.backend, self._client, name)

    async def _provide(self, path: str, manifest: Object) -> None:
        answer = await self._client.post(path, json=manifest)
        if answer.status_code != 409:
            self._checked(answer)

    async def _post(self, path: str, manifest: Object) -> Object:
        return self._checked(await self._client.post(path, json=manifest))

    @staticmethod
    def _checked(answer: httpx.Response) -> Object:
        assert answer.is_success, f"{answer.request.method} {answer.request.url}: {answer.text}"
        content: Object = answer.json()
        return content

    def path(self, plural: str, name: str = "") -> str:
        base = f"/{_GROUPS.get(plural, 'api/v1')}/namespaces/{self.namespace}/{plural}"
        return f"{base}/{name}" if name else base

    async def create(self, name: str, **spec: Any) -> Object:
        """A KVCluster."""
        head = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster"}
        return await self._post(self.path("kvclusters"), {**head, "metadata": {"name": name}, "spec": spec})

    async def try_create(self, manifest: Object, **query: str) -> httpx.Response:
        """A KVCluster as it is, and what the server says."""
        return await self._client.post(self.path("kvclusters"), json=manifest, params=query)

    async def try_patch(self, plural: str, name: str, patch: Object) -> httpx.Response:
        return await self._client.patch(self.path(plural, name), json=patch, headers=MERGE)

    async def apply_raw(self, plural: str, manifest: Object) -> Object:
        path = self.path(plural, manifest["metadata"]["name"])
        answer = await self._client.patch(path, json=manifest, params={"fieldManager": "someone"}, headers=APPLY)
        return self._checked(answer)

    async def patch(self, plural: str, name: str, patch: Object) -> Object:
        return self._checked(await self.try_patch(plural, name, patch))

    async def scale(self, plural: str, name: str, replicas: int) -> None:
        path = f"{self.path(plural, name)}/scale"
        self._checked(await self._client.patch(path, json={"spec": {"replicas": replicas}}, headers=MERGE))

    async def delete(self, plural: str, name: str) -> None:
        self._checked(await self._client.delete(self.path(plural, name)))

    async def collect_garbage(self, names: frozenset[str]) -> None:
        """Delete what belonged to a deleted object, as a garbage collector does, where there is none."""
        if not self.backend.collects_garbage:
            for name in names:
                await self.delete(*name.split("/"))

    async def find(self, plural: str, name: str) -> Object | None:
        answer = await self._client.get(self.path(plural, name))
        return None if answer.status_code == 404 else self._checked(answer)

    async def get(self, plural: str, name: str) -> Object:
        found = await self.find(plural, name)
        assert found is not None, f"{plural}/{name} is not there"
        return found

    async def list(self, plural: str) -> list[Object]:
        found: list[Object] = self._checked(await self._client.get(self.path(plural)))["items"]
        return found

    async def events(self) -> list[Object]:
        return await self.list("events")

    async def _owned(self, *plurals: str) -> dict[str, Object]:
        found = {}
        for plural in plurals or _OWNED:
            for item in await self.list(plural):
                found[f"{plural}/{item['metadata']['name']}"] = item
        return found

    async def versions(self, *plurals: str) -> dict[str, str]:
        """resourceVersion of every object, by plural/name."""
        return {name: item["metadata"]["resourceVersion"] for name, item in (await self._owned(*plurals)).items()}

    async def owners(self) -> set[str]:
        """uids of the owners of all objects."""
        return {
            owner["uid"]
            for item in (await self._owned()).values()
            for owner in item["metadata"].get("ownerReferences", ())
        }

    async def has(self, names: frozenset[str] | set[str], cluster: str = "rag") -> bool:
        wanted = {name.replace("/rag-", f"/{cluster}-") for name in names}
        return wanted <= (await self._owned()).keys()

    async def lacks(self, names: frozenset[str] | set[str]) -> bool:
        return not names & (await self._owned()).keys()

    async def stated(self, plural: str, name: str) -> Object | None:
        """An object without what changes by itself."""
        found = await self.find(plural, name)
        if found is None:
            return None
        metadata = {key: found["metadata"].get(key) for key in ("labels", "annotations", "ownerReferences")}
        return {**{key: value for key, value in found.items() if key != "status"}, "metadata": metadata}

    async def conditions(self, name: str) -> list[Object]:
        found: list[Object] = (await self.get("kvclusters", name)).get("status", {}).get("conditions", [])
        return found

    async def condition(self, name: str, kind: str, reason: str) -> bool:
        return any(each["type"] == kind and each["reason"] == reason for each in await self.conditions(name))

    async def settled(self, name: str, within: float = 60.0) -> None:
        """The operator has seen the latest spec, and has not written for a moment."""

        async def seen() -> bool:
            body = await self.get("kvclusters", name)
            return bool(body.get("status", {}).get("observedGeneration") == body["metadata"]["generation"])

        await eventually(seen, f"the operator has seen {name}", within)
        last: dict[str, str] = {}

        async def quiet() -> bool:
            nonlocal last
            before, last = last, await self.versions() | await self.versions("kvclusters")
            await asyncio.sleep(0.25)
            return before == last

        await eventually(quiet, "the operator has nothing more to write", within)

    def writes(self) -> int:
        """Requests of the operator that were to change something."""
        reading = ("get", "list", "watch")
        return sum(
            each.user == OPERATOR and each.verb not in reading and each.namespace == self.namespace
            for each in self.backend.requests
        )


def _namespace(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


class Controller:
    """`python -m controller.main` as a process of its own."""

    def __init__(self, kubeconfig: Path, log: Path, *options: str) -> None:
        self._kubeconfig = kubeconfig
        self._log = log
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._killer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "controller.main", f"--kubeconfig={self._kubeconfig}", f"--image={IMAGE}"),
                *("--host=127.0.0.1", "--metrics-port=0", "--health-port=0", "--router-drain-delay=0.5"),
                *self._options,
                stdout=log,
                stderr=log,
                env={**os.environ, "KUBECONFIG": str(self._kubeconfig)},
                cwd=ROOT,
            )

    def log(self) -> list[str]:
        """The lines it has written."""
        return self._log.read_text().splitlines()

    async def metric(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of a metric by those of its labels, which are in the order of their names; without samples that are 0.
        Empty while it starts."""
        port = re.search(r"metrics_port=(\d+)", self._log.read_text())
        if port is None:
            return {}
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://127.0.0.1:{port[1]}/metrics")).text
        full = f"kvcluster_controller_{name}"
        [family] = [each for each in text_string_to_metric_families(text) if each.name == full]
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for sample in family.samples
            if sample.value and not sample.name.endswith("_created")
        }

    def cpu_seconds(self) -> float:
        """CPU it has used so far."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_megabytes(self) -> int:
        """Memory it holds now."""
        assert self._process is not None
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

    async def kill(self) -> None:
        """SIGKILL: it cannot shut down in order."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def kill_after_writes(self, cluster: Cluster, writes: int) -> None:
        """Kills it as soon as it has written so often, counted from now."""
        start = cluster.writes()

        async def watch() -> None:
            while cluster.writes() - start < writes:  # noqa: ASYNC110  the server's log sets no event
                await asyncio.sleep(0.001)
            await self.kill()

        self._killer = asyncio.create_task(watch())

    async def killed(self) -> None:
        assert self._killer is not None
        await asyncio.wait_for(self._killer, 60)

    async def stop(self) -> None:
        """SIGTERM; it must end in order."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            ended = await asyncio.wait_for(self._process.wait(), 20)
            # A process that has only begun to import its modules ends by the signal itself.
            assert ended in (0, -signal.SIGTERM), self._log.read_text()


SPECS = {
    "plain": {"workers": {"replicas": 2}},
    "full": {"autoscaling": {"max": 3}, "networkPolicy": {"enabled": True}},
}


async def converged(cluster: Cluster, *names: str, deleted: tuple[str, str] | None = None) -> None:
    """Every cluster has its objects, each made once (but for one that was `deleted`); none of one that is gone."""
    for name in names:
        await eventually(lambda name=name: cluster.has(OBJECTS, name), f"{name} is complete", 60)
        await cluster.settled(name, 60)
    uids = {(await cluster.get("kvclusters", name))["metadata"]["uid"] for name in names}

    async def no_orphans() -> bool:
        return await cluster.owners() <= uids

    await eventually(no_orphans, "nothing belongs to a cluster that is gone", 30)
    made = Counter(
        (each.resource, each.name)
        for each in cluster.backend.requests
        if each.user == cluster.operator
        and each.namespace == cluster.namespace
        and each.verb == "patch"
        and each.status == 201
    )
    assert [name for name, times in made.items() if times > 1 and name != deleted] == [], "made twice"


@asynccontextmanager
async def prepared(backend: Backend | None = None) -> AsyncIterator[Cluster]:
    """An API server that knows KVClusters: this one, else a fake one of its own."""
    async with AsyncExitStack() as stack:
        if backend is None:
            server = FakeApiServer()
            await server.start()
            stack.push_async_callback(server.stop)
            backend = FakeBackend(server)
        cluster = Cluster(backend, await stack.enter_async_context(backend.client()))
        await cluster.prepare()
        yield cluster
