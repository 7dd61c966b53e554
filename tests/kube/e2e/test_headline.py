"""What the first page promises: helm install, kubectl apply, kubectl wait, a request; and all of it away again.

The controller runs in the pod that the chart describes, with the rights that the chart gives it. Not covered: images
and networks of a real cluster (deploy/kind/up.sh), other values of the chart (tests/deploy).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import httpx
import pytest

from tests.kube.apiserver import FakeApiServer
from tests.kube.kubectl import MISSING, Tool, helm_binaries, kubectl_binaries
from tests.kube.kubelet import FakeNode
from tests.kube.operator.support import ROOT
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

# The newest ones. Earlier ones do the same, command by command, in tests/deploy and tests/kube/operator.
PAIRS = [
    pytest.param(helm, kubectl, id=f"{helm.name} {kubectl.name}")
    for helm, kubectl in zip(helm_binaries()[-1:], kubectl_binaries()[-1:], strict=True)
]
NONE = [pytest.param(None, None, marks=pytest.mark.skip(reason=MISSING), id="none")]

RELEASED, CHECKOUT = "oci://REGISTRY/OWNER/charts/kvcluster --version VERSION", "deploy/helm/kvcluster"


def commands() -> list[list[str]]:
    """The README's commands for Kubernetes, which install the chart of the checkout instead of a release's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert RELEASED in found[1]
    lines = found[1].replace(RELEASED, CHECKOUT).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize(("helm_binary", "kubectl_binary"), PAIRS or NONE)
async def test_the_readmes_commands(helm_binary: Path, kubectl_binary: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # kubectl's plugin
    monkeypatch.chdir(ROOT)
    server = FakeApiServer()
    await server.start()
    admin = server.kubeconfig(tmp_path / "admin")

    helm, kubectl = Tool(helm_binary, admin, tmp_path), Tool(kubectl_binary, admin, tmp_path)
    printed = {}
    try:
        async with FakeNode(server, logs=tmp_path / "logs") as node:
            for program, *arguments in commands():
                tool = {"helm": helm, "kubectl": kubectl}[program]
                printed[" ".join(arguments[:2])] = await tool(*arguments, deadline=120)
            assert "cache_aware" in printed["get kvc"]
            for words in ("cache_aware", "rag-worker-", "Ready"):
                assert words in printed["kvcluster explain"]
            await _answers(f"http://{node.cluster_ip('default', 'rag-router')}:8000")
            denied = [each for each in server.requests if each.status == 403]
            assert denied == [], "the rights that the chart and the operator give suffice"
            await kubectl("delete", "kvcluster", "rag")

            async def gone() -> bool:
                return "rag-" not in await kubectl("get", "pods,services,deployments", "-o", "name")

            await eventually(gone, "nothing of it is left", 60)
            # A router's rights may go before it does.
            denied = [each for each in server.requests if each.status == 403 and "rag-router" not in each.user]
            assert denied == []
            await helm("uninstall", "kvcluster", "-n", "kvcluster-system")
    finally:
        await server.stop()


async def _answers(url: str) -> None:
    async def answered() -> bool:
        async with httpx.AsyncClient(trust_env=False) as client:
            try:
                body = {"prompt": "def hello():", "max_tokens": 4}
                return (await client.post(f"{url}/v1/completions", json=body)).is_success
            except httpx.ConnectError:
                return False

    await eventually(answered, "a request is answered")
