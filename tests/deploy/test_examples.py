"""Every example is a manifest that the model accepts, and that an API server with our CRD accepts from kubectl.

Not covered: what runs from them (tests/kube/e2e runs examples/rag.yaml); images, volumes and GPUs that they name.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.api.crd import crd_yaml
from controller.api.load import validate_manifest
from deploy.helm.docs import CHART, ROOT
from tests.kube.backends import Backend
from tests.kube.kubectl import MISSING, kubectl_binaries

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
NAMES = {"minimal", "rag", "autoscaled", "multi-namespace", "vllm", "adapters"}


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def kvclusters(file: Path) -> list[dict[str, Any]]:
    return [document for document in documents(file) if document["kind"] == "KVCluster"]


def test_the_examples_that_people_are_told_of_are_there() -> None:
    assert {file.stem for file in EXAMPLES} >= NAMES


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_model_accepts_it(file: Path) -> None:
    manifests = kvclusters(file)
    assert manifests
    for manifest in manifests:
        assert validate_manifest(manifest).name == manifest["metadata"]["name"]


def test_the_namespaces_of_an_example_are_in_it() -> None:
    found = documents(ROOT / "examples" / "multi-namespace.yaml")
    made = {document["metadata"]["name"] for document in found if document["kind"] == "Namespace"}
    assert {document["metadata"]["namespace"] for document in found if document["kind"] == "KVCluster"} == made
    assert len(made) == 2


def test_the_charts_crd_is_the_models() -> None:
    written = (CHART / "files" / "crd.yaml").read_text(encoding="utf-8")
    assert written == crd_yaml(), "run: python -m controller.api.crd"


@pytest.mark.process
@pytest.mark.parametrize("version", ["1.32", "1.35"])
async def test_kubectl_applies_all_of_them(server: Backend, version: str, tmp_path: Path) -> None:
    binary = next((found for found in kubectl_binaries() if found.name == f"kubectl-{version}"), None)
    if binary is None:
        pytest.skip(MISSING)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "KUBECONFIG": str(server.kubeconfig(tmp_path / "kubeconfig")),
    }

    async def kubectl(*arguments: str | Path) -> str:
        command = [str(binary), *map(str, arguments)]
        ended = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, env=environment, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return str(ended.stdout)

    # As docs/helm.md says for those who keep the CRD out of the release.
    await kubectl("apply", "--server-side", "--filename", CHART / "files" / "crd.yaml")
    await kubectl("wait", "--for=condition=Established", "crd/kvclusters.kvcluster.dev", "--timeout=30s")
    for file in EXAMPLES:
        await kubectl("apply", "--filename", file)
    wanted = {manifest["metadata"]["name"] for file in EXAMPLES for manifest in kvclusters(file)}
    assert wanted <= set((await kubectl("get", "kvc", "--all-namespaces")).split())
