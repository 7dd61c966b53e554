"""The chart in the life of a release, against an API server: install, upgrade, roll back, uninstall; and the
controller with exactly the rights that the chart gives it.

Not covered: the content of the objects (test_chart.py), and a chart from a registry (test_release.py).
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from controller.objects.access import OBJECTIVE_GROUPS
from deploy.helm.docs import CHART
from tests.deploy.conftest import NAMESPACE, RELEASE, Helm
from tests.deploy.controller import running_controller
from tests.kube.backends import Backend, granted, used
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

Object = dict[str, Any]

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
DEPLOYMENT = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{RELEASE}-kvcluster"
EVERYTHING: Object = {
    "workers": {"replicas": 2},
    "monitoring": {"podMonitor": True},
    "networkPolicy": {"enabled": True},
    "gateway": {"inferencePool": True},
    "router": {"ingress": {"host": "llm.example.com"}, "httpRoute": {"parentRefs": [{"name": "gateway"}]}},
    "autoscaling": {"type": "keda", "min": 1, "max": 3, "prometheusAddress": "http://prometheus:9090"},
}
"""A spec that asks for an object of every kind but the HorizontalPodAutoscaler."""
GROUPS: Mapping[str, str] = {
    "kvclusters": "apis/kvcluster.dev/v1alpha1",
    "deployments": "apis/apps/v1",
    "poddisruptionbudgets": "apis/policy/v1",
    "networkpolicies": "apis/networking.k8s.io/v1",
    "ingresses": "apis/networking.k8s.io/v1",
    "httproutes": "apis/gateway.networking.k8s.io/v1",
    "horizontalpodautoscalers": "apis/autoscaling/v2",
    "inferencepools": "apis/inference.networking.k8s.io/v1",
    "podmonitors": "apis/monitoring.coreos.com/v1",
    "scaledobjects": "apis/keda.sh/v1alpha1",
    "roles": "apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "apis/rbac.authorization.k8s.io/v1",
}


def path(namespace: str, plural: str, name: str = "") -> str:
    return f"/{GROUPS.get(plural, 'api/v1')}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


class Api:
    """The API server, as its administrator sees it."""

    def __init__(self, server: Backend, client: httpx.AsyncClient, helm: Helm) -> None:
        self.server = server
        self._client = client
        self._helm = helm

    async def helm(self, *arguments: str | Path, helm: Helm | None = None) -> str:
        """What helm prints. The server lives on this event loop, so helm is waited for in a thread."""
        return await asyncio.to_thread((helm or self._helm).ok, *arguments, "--namespace", NAMESPACE)

    async def find(self, where: str) -> Object | None:
        answer = await self._client.get(where)
        assert answer.is_success or answer.status_code == 404, answer.text
        return None if answer.status_code == 404 else dict(answer.json())

    async def get(self, where: str) -> Object:
        found = await self.find(where)
        assert found is not None, where
        return found

    async def create(self, where: str, manifest: Object) -> None:
        answer = await self._client.post(where, json=manifest)
        assert answer.is_success, answer.text

    async def patch(self, where: str, patch: Object) -> None:
        headers = {"content-type": "application/merge-patch+json"}
        answer = await self._client.patch(where, json=patch, headers=headers)
        assert answer.is_success, answer.text

    async def namespace(self, name: str) -> None:
        await self.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    async def foreign_crd(self, group: str, version: str, kind: str) -> None:
        """A CRD of someone else's, without rules."""
        plural = f"{kind.lower()}s"
        schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
        spec = {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        }
        head = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
        # Groups of Kubernetes' own need it.
        approved = {"api-approved.kubernetes.io": "https://github.com/kubernetes/enhancements"}
        metadata = {"name": f"{plural}.{group}", "annotations": approved}
        await self.create(CRD, {**head, "metadata": metadata, "spec": spec})

    async def kvcluster(self, namespace: str, name: str, spec: Object) -> None:
        manifest = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": name}}
        await self.create(path(namespace, "kvclusters"), {**manifest, "spec": spec})


@pytest.fixture
async def api(server: Backend, helm: Helm, tmp_path: Path) -> AsyncIterator[Api]:
    helm.use(server.kubeconfig(tmp_path / "admin"))
    async with server.client() as client:
        yield Api(server, client, helm)


def older_chart(folder: Path) -> Path:
    """This chart as an earlier release may have been: its CRD lacks a field of the spec."""
    chart = folder / "older"
    shutil.copytree(CHART, chart)
    about = chart / "Chart.yaml"
    about.write_text(re.sub(r"(?m)^version: .*", "version: 0.0.9", about.read_text()))
    file = chart / "files" / "crd.yaml"
    crd = yaml.safe_load(file.read_text())
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["monitoring"], spec["default"]["monitoring"]
    file.write_text(yaml.safe_dump(crd, sort_keys=False))
    return chart


async def spec_fields(api: Api) -> set[str]:
    [version] = (await api.get(f"{CRD}/kvclusters.kvcluster.dev"))["spec"]["versions"]
    return set(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])


async def level(api: Api) -> str:
    [container] = (await api.get(DEPLOYMENT))["spec"]["template"]["spec"]["containers"]
    return str({variable["name"]: variable.get("value") for variable in container["env"]}["CONTROLLER_LOG_LEVEL"])


async def test_the_life_of_a_release(api: Api, tmp_path: Path) -> None:
    await api.helm("install", RELEASE, older_chart(tmp_path), "--create-namespace")
    assert "monitoring" not in await spec_fields(api)
    await api.namespace("team")
    await api.kvcluster("team", "rag", {"workers": {"replicas": 2}})

    notes = await api.helm("upgrade", RELEASE, CHART, "--set=logLevel=debug")
    assert f"helm test {RELEASE}" in notes
    assert await level(api) == "debug"
    assert "monitoring" in await spec_fields(api), "an upgrade of the release upgrades the CRD"

    await api.helm("rollback", RELEASE, "1")
    assert await level(api) == "info"
    await api.helm("upgrade", RELEASE, CHART, "--reset-values")

    await api.helm("uninstall", RELEASE)
    assert await api.find(DEPLOYMENT) is None
    assert await api.find(f"{CRD}/kvclusters.kvcluster.dev") is not None, "the CRD is kept, and with it all KVClusters"
    assert await api.find(path("team", "kvclusters", "rag")) is not None
    # A new release of the same name takes up the CRD that was kept.
    await api.helm("install", RELEASE, CHART)
    assert await api.find(path("team", "kvclusters", "rag")) is not None


async def test_nothing_is_left_behind_but_the_crd(api: Api) -> None:
    # Every object of our own, whatever its kind, is asked for by the label that all of them have.
    await api.helm("install", RELEASE, CHART, "--create-namespace", f"--values={CHART / 'ci' / 'default-values.yaml'}")
    await api.helm("uninstall", RELEASE)
    for where in (
        *(path(NAMESPACE, plural) for plural in ("deployments", "services", "serviceaccounts", "secrets")),
        *(f"/apis/rbac.authorization.k8s.io/v1/{plural}" for plural in ("clusterroles", "clusterrolebindings")),
    ):
        left = await api.get(f"{where}?labelSelector=app.kubernetes.io/instance={RELEASE}")
        assert left["items"] == [], where


async def test_a_release_of_helm_3_goes_on_with_helm_4(api: Api, helm: Helm, helm_4: Helm) -> None:
    helm_4.use(helm.kubeconfig)
    await api.helm("install", RELEASE, CHART, "--create-namespace")
    await api.helm("upgrade", RELEASE, CHART, "--set=logLevel=warning", helm=helm_4)
    assert await level(api) == "warning"
    await api.helm("uninstall", RELEASE, helm=helm_4)
    assert await api.find(DEPLOYMENT) is None


@asynccontextmanager
async def controller_of_the_release(api: Api, folder: Path) -> AsyncIterator[str]:
    """The controller with the environment and the identity that the release's pod has; the user's name."""
    pod = (await api.get(DEPLOYMENT))["spec"]["template"]["spec"]
    [container] = pod["containers"]
    # An API server leaves out empty values; what comes from a field of the pod is its namespace.
    settings = {
        variable["name"]: NAMESPACE if "valueFrom" in variable else variable.get("value", "")
        for variable in container["env"]
    }
    user = f"system:serviceaccount:{NAMESPACE}:{pod['serviceAccountName']}"
    kubeconfig = api.server.kubeconfig(folder / "controller", user)
    async with running_controller(kubeconfig, folder / "controller.log", settings):
        yield user


OBJECTS = {
    "deployments": ("rag-router", "rag-worker"),
    "services": ("rag-router", "rag-router-management", "rag-worker"),
    "configmaps": ("rag-router", "rag-worker"),
    "serviceaccounts": ("rag-router",),
    "roles": ("rag-router",),
    "rolebindings": ("rag-router",),
    "poddisruptionbudgets": ("rag-router", "rag-worker"),
    "networkpolicies": ("rag-router", "rag-worker"),
    "ingresses": ("rag-router",),
    "httproutes": ("rag-router",),
    "inferencepools": ("rag-worker",),
    "podmonitors": ("rag-router", "rag-worker"),
    "scaledobjects": ("rag-worker",),
}


async def all_made(api: Api, namespace: str) -> bool:
    wanted = [path(namespace, plural, name) for plural, names in OBJECTS.items() for name in names]
    return all([await api.find(where) is not None for where in wanted])


async def leave_remains(api: Api, namespace: str) -> list[str]:
    """Objects as an earlier version of the operator may have made them, unknown to this one; where they are."""
    left = []
    for plural, (name, *_) in OBJECTS.items():
        item = await api.get(path(namespace, plural, name))
        metadata = {field: item["metadata"][field] for field in ("labels", "ownerReferences")}
        spec = {field: value for field, value in item.get("spec", {}).items() if not field.startswith("clusterIP")}
        copy = {**item, "metadata": {**metadata, "name": f"old-{plural}"}, **({"spec": spec} if "spec" in item else {})}
        copy.pop("status", None)
        await api.create(path(namespace, plural), copy)
        left.append(path(namespace, plural, f"old-{plural}"))
    return left


async def all_gone(api: Api, where: list[str]) -> bool:
    return not any([await api.find(each) is not None for each in where])


async def look_after(api: Api, namespace: str) -> None:
    """Everything that the controller does to a KVCluster: makes its objects, removes them, writes status and events."""
    await api.kvcluster(namespace, "rag", EVERYTHING)
    await eventually(lambda: all_made(api, namespace), "every object was made", 30)
    remains = await leave_remains(api, namespace)
    await eventually(lambda: all_gone(api, remains), "what belongs to the KVCluster and is not asked for is gone", 30)
    less = {"monitoring": {"podMonitor": False}, "networkPolicy": {"enabled": False}, "autoscaling": {"type": "hpa"}}
    await api.patch(path(namespace, "kvclusters", "rag"), {"spec": less})

    async def changed() -> bool:
        gone = [path(namespace, plural, "rag-worker") for plural in ("podmonitors", "networkpolicies", "scaledobjects")]
        made = path(namespace, "horizontalpodautoscalers", "rag-worker")
        return await api.find(made) is not None and not any([await api.find(where) for where in gone])

    await eventually(changed, "what is no longer asked for is gone", 30)
    await api.patch(path(namespace, "kvclusters", "rag"), {"spec": {"autoscaling": None}})
    scaler = path(namespace, "horizontalpodautoscalers", "rag-worker")
    await eventually(lambda: all_gone(api, [scaler]), "the autoscaler is gone", 30)

    async def told() -> bool:
        body = await api.get(path(namespace, "kvclusters", "rag"))
        events = (await api.get(path(namespace, "events")))["items"]
        return bool(events) and bool(body.get("status", {}).get("conditions"))

    await eventually(told, "status and events say what happened", 30)


def refused(api: Api, user: str) -> set[str]:
    """Resources of which the user was refused something."""
    return {
        f"{entry.verb} {entry.resource}" for entry in api.server.requests if entry.user == user and entry.status == 403
    }


NOT_REQUESTED = {
    # Asked of whoever sets an owner reference that blocks deletion, where that admission plugin is on.
    ("update", "kvcluster.dev", "kvclusters/finalizers"),
    # Requested where workers answer requests: tests/kube/e2e holds that to it.
    ("patch", "", "pods"),
    # Held only to be granted to routers.
    *((verb, "discovery.k8s.io", "endpointslices") for verb in ("list", "watch")),
    *((verb, group, "inferenceobjectives") for verb in ("list", "watch") for group in OBJECTIVE_GROUPS),
}


one_helm = pytest.mark.parametrize("helm", [4], ids=["helm-4"], indirect=True)
"""For tests of what the chart's objects do: both versions of helm render the same (test_chart.py)."""


async def prepare(api: Api, *settings: str | Path) -> None:
    await api.foreign_crd("monitoring.coreos.com", "v1", "PodMonitor")
    await api.foreign_crd("keda.sh", "v1alpha1", "ScaledObject")
    await api.foreign_crd("gateway.networking.k8s.io", "v1", "HTTPRoute")
    await api.foreign_crd("inference.networking.k8s.io", "v1", "InferencePool")
    await api.helm("install", RELEASE, CHART, "--create-namespace", *settings)


@one_helm
async def test_the_controllers_rights_are_what_it_asks_for(api: Api, tmp_path: Path) -> None:
    await prepare(api)
    await api.namespace("team-a")
    async with controller_of_the_release(api, tmp_path) as user:
        await look_after(api, "team-a")
        assert refused(api, user) == set()
        role = await api.get(f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{NAMESPACE}:{RELEASE}-kvcluster")
        assert used(api.server.requests, user) == granted(role["rules"]) - NOT_REQUESTED


@one_helm
async def test_in_listed_namespaces_it_needs_nothing_cluster_wide(api: Api, tmp_path: Path) -> None:
    for name in ("team-a", "team-b", "other"):
        await api.namespace(name)
    await prepare(api, f"--values={CHART / 'ci' / 'namespaced-values.yaml'}", "--set=crds.install=true")
    await api.kvcluster("other", "rag", EVERYTHING)
    async with controller_of_the_release(api, tmp_path) as user:
        await look_after(api, "team-a")
        await look_after(api, "team-b")
        assert not (await api.get(path("other", "deployments")))["items"], "not its business"
        assert refused(api, user) == set()
