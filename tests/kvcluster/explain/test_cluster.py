"""`kvcluster explain` against an API server with our CRD, pods with statuses, the proxy to a router, and RBAC.

Not covered: how the page looks (test_page), and answers that no API server of ours gives (test_explain).
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from controller.api.crd import crd
from controller.status.compute import selector
from kvcluster.commands.explain import read_page
from kvcluster.explain.gather import NotFoundError
from runtime.kube.errors import KubeApiError
from tests.controller.status.support import waiting
from tests.kube.apiserver import FakeApiServer
from tests.kube.kubelet.network import Loopback
from tests.kvcluster.explain.support import EVENT, STATUS, a_pod, cluster, row

pytestmark = pytest.mark.process

TOKEN = "the-token-of-the-routers"
MANAGEMENT_PORT = 9000
"""Of every router: each needs an address of its own."""
CLUSTERS = "/apis/kvcluster.dev/v1alpha1/namespaces/ns/kvclusters"


@pytest.fixture
def router() -> Iterator[str]:
    """A router pod's management port."""
    pages = {"/status": STATUS, "/workers": {"workers": [row("rag-worker-0"), row("rag-worker-1", matching=False)]}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(pages[self.path]).encode()
            self.send_response(200 if self.headers.get("x-kvcluster-token") == TOKEN else 401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return None

    with (
        contextlib.closing(Loopback()) as network,
        HTTPServer((network.pod(), MANAGEMENT_PORT), Handler) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield str(server.server_address[0])
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Populated:
    """An API server and a client of its administrator."""

    api: FakeApiServer
    client: httpx.AsyncClient

    async def create(self, path: str, item: dict[str, Any]) -> dict[str, Any]:
        answer = await self.client.post(path, json=item)
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def create_with_status(self, path: str, item: dict[str, Any]) -> dict[str, Any]:
        created = await self.create(path, item)
        place = f"{path}/{item['metadata']['name']}/status"
        answer = await self.client.put(place, json={**created, "status": item["status"]})
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def populated(router: str) -> AsyncIterator[Populated]:
    """A namespace `ns` with KVCluster `rag`: a router, a healthy worker and one whose image cannot be pulled."""
    api = FakeApiServer()
    await api.start()
    try:
        async with httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
            found = Populated(api, client)
            await found.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd())
            await found.create(
                "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}}
            )
            broken = a_pod("rag-worker-x", ready=False, containerStatuses=waiting("ErrImagePull", "not found"))
            pods = [a_pod("rag-router-a", podIP=router), a_pod("rag-worker-0"), broken, a_pod("rag-worker-1")]
            await found.create_with_status(CLUSTERS, cluster(pods=tuple(pods)))
            containers = {"containers": [{"name": "c", "image": "registry.example/kvcluster:9"}]}
            volumes = {"volumes": [{"name": "kvcluster-management", "secret": {"secretName": "tokens"}}]}
            data = {"token": base64.b64encode(TOKEN.encode()).decode()}
            secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tokens", "namespace": "ns"}}
            await found.create("/api/v1/namespaces/ns/secrets", {**secret, "data": data})
            for pod in pods:
                whole = {"apiVersion": "v1", "kind": "Pod", **pod, "spec": {**pod["spec"], **containers, **volumes}}
                whole["metadata"] |= {"namespace": "ns"}
                await found.create_with_status("/api/v1/namespaces/ns/pods", whole)
            event = {"apiVersion": "v1", "kind": "Event", **EVENT, "metadata": {"name": "e", "namespace": "ns"}}
            event["involvedObject"] = {**event["involvedObject"], "namespace": "ns"}
            await found.create("/api/v1/namespaces/ns/events", event)
            about = {"kind": "Pod", "name": "rag-worker-x", "namespace": "ns"}
            warning = {**event, "type": "Warning", "reason": "Failed", "involvedObject": about}
            await found.create(
                "/api/v1/namespaces/ns/events", {**warning, "metadata": {"name": "w", "namespace": "ns"}}
            )
            yield found
    finally:
        await api.stop()


async def test_the_crd_keeps_every_field_of_the_status(populated):
    written = cluster()
    written["metadata"]["name"] = "other"
    assert (await populated.create_with_status(CLUSTERS, written))["status"] == written["status"]


async def test_the_scale_subresource_reads_the_status(populated):
    scale = (await populated.client.get(f"{CLUSTERS}/rag/scale")).json()
    assert scale["status"] == {
        "replicas": 4,
        "selector": selector("rag"),
    }


async def test_one_page(populated, tmp_path: Path):
    config = populated.api.kubeconfig(tmp_path / "config", namespace="ns")
    found = await read_page("rag", kubeconfig=config)
    assert [pod.name for pod in found.pods] == ["rag-router-a", "rag-worker-0", "rag-worker-1", "rag-worker-x"]
    assert found.routers[0].report is not None
    assert found.routers[0].error == ""
    assert found.pods[1].worker is not None
    assert [event.reason for event in found.events] == ["Failed", "Serving"]
    assert len(found.problems) == 2
    assert "Pod rag-worker-x cannot pull image" in found.problems[0]
    assert found.problems[1].startswith("Worker rag-worker-1 gets requests by load alone")
    assert found.unread == ()
    verbs = {entry.verb for entry in populated.api.requests if entry.user == "admin" and entry.subresource == "proxy"}
    assert verbs == {"get"}


async def test_what_a_user_may_not_read_is_said(populated, tmp_path: Path):
    role = {"name": "reader", "namespace": "ns"}
    rules = [{"apiGroups": ["kvcluster.dev"], "resources": ["kvclusters"], "verbs": ["get"]}]
    rules += [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/ns"
    kind = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    await populated.create(f"{rbac}/roles", {**kind, "kind": "Role", "metadata": role, "rules": rules})
    binding = {
        **kind,
        "kind": "RoleBinding",
        "metadata": role,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "eve", "namespace": "ns"}],
    }
    await populated.create(f"{rbac}/rolebindings", binding)
    eve = populated.api.kubeconfig(tmp_path / "eve", user="system:serviceaccount:ns:eve", namespace="ns")
    found = await read_page("rag", kubeconfig=eve)
    assert len(found.pods) == 4
    assert "forbidden" in found.routers[0].error
    assert len(found.unread) == 1
    assert "events could not be read: 403" in found.unread[0]
    assert len(found.conditions) == 6
    bob = populated.api.kubeconfig(tmp_path / "bob", user="system:serviceaccount:ns:bob", namespace="ns")
    with pytest.raises(KubeApiError, match="403"):
        await read_page("rag", kubeconfig=bob)


async def test_one_that_is_not_there(populated, tmp_path: Path):
    config = populated.api.kubeconfig(tmp_path / "config", namespace="ns")
    with pytest.raises(NotFoundError, match=r"no KVCluster rga in namespace ns of http://[^ ]+; there are: rag"):
        await read_page("rga", kubeconfig=config)
    with pytest.raises(NotFoundError, match="there is none; -n names another namespace"):
        await read_page("rag", namespace="default", kubeconfig=config)


async def test_a_server_that_knows_no_kvclusters(tmp_path: Path):
    api = FakeApiServer()
    await api.start()
    try:
        with pytest.raises(NotFoundError, match="install the chart"):
            await read_page("rag", kubeconfig=api.kubeconfig(tmp_path / "config"))
    finally:
        await api.stop()
