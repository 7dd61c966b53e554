"""What the first page promises: helm install, kubectl apply, kubectl wait, a request; and all of it away again.

The controller runs in the pod that the chart describes, with the rights that the chart gives it.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.kube.apiserver import FakeApiServer
from tests.kube.binaries import MISSING, helm_binaries, kubectl_binaries
from tests.kube.kubectl import Tool
from tests.kube.kubelet import FakeNode
from tests.kube.operator.support import ROOT, eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

PAIRS = [
    pytest.param(helm, kubectl, id=f"{helm.name} {kubectl.name}")
    for helm, kubectl in zip(helm_binaries(), kubectl_binaries(), strict=True)
]
NONE = [pytest.param(None, None, marks=pytest.mark.skip(reason=MISSING), id="none")]


@pytest.mark.parametrize(("helm_binary", "kubectl_binary"), PAIRS or NONE)
async def test_from_helm_install_to_an_answer(helm_binary: Path, kubectl_binary: Path, tmp_path: Path):
    server = FakeApiServer()
    await server.start()
    admin = server.kubeconfig(tmp_path / "admin")

    def kubeconfig(namespace: str, account: str) -> Path:
        file = tmp_path / f"kubeconfig-{namespace}-{account}"
        return server.kubeconfig(file, f"system:serviceaccount:{namespace}:{account}")

    helm, kubectl = Tool(helm_binary, admin, tmp_path), Tool(kubectl_binary, admin, tmp_path)
    try:
        async with FakeNode(server.url, logs=tmp_path / "logs", kubeconfig_for=kubeconfig) as node:
            chart = str(ROOT / "deploy" / "helm" / "kvcluster")
            await helm("install", "kvcluster", chart, "--namespace=kvcluster-system", "--create-namespace")
            await kubectl("-n", "kvcluster-system", "rollout", "status", "deployment/kvcluster", "--timeout=60s")
            await kubectl("apply", "-f", str(ROOT / "examples" / "rag.yaml"))
            await kubectl("wait", "--for=condition=Ready", "kvcluster/rag", "--timeout=90s", deadline=100)
            url = f"http://{node.cluster_ip('default', 'rag-router')}:8000"

            async def answered() -> bool:
                async with httpx.AsyncClient(trust_env=False) as client:
                    body = {"prompt": "def hello():", "max_tokens": 4}
                    try:
                        return (await client.post(f"{url}/v1/completions", json=body)).is_success
                    except httpx.ConnectError:
                        return False

            await eventually(answered, "a request is answered")
            await kubectl("delete", "kvcluster", "rag")

            async def gone() -> bool:
                return "rag-" not in await kubectl("get", "pods,services,deployments", "-o", "name")

            await eventually(gone, "nothing of it is left", 60)
            denied = [each for each in server.requests if each.status == 403]
            assert denied == [], "the rights that the chart and the operator give suffice"
            await helm("uninstall", "kvcluster", "--namespace=kvcluster-system")
    finally:
        await server.stop()
