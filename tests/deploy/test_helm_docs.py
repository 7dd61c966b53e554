"""The commands of docs/helm.md work as they are written, one after another, against one API server.

Not covered: the commands that build and push an image, and pods: nothing runs here.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from deploy.helm.docs import DOCUMENT, ROOT
from tests.deploy.conftest import Helm
from tests.kube.backends import Backend
from tests.kube.kubectl import MISSING, helm_binaries, kubectl_binaries

pytestmark = pytest.mark.process

NEED_PODS = ("docker ", "helm test ", "kubectl wait ", "rollout status ")
"""Commands for which containers must be built or run."""


def commands() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


async def test_the_documents_commands(server: Backend, helm: Helm, tmp_path: Path) -> None:
    kubectls = kubectl_binaries()
    if not kubectls:
        pytest.skip(MISSING)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl").symlink_to(kubectls[-1])
    (folder / "helm").symlink_to(next(binary for binary in helm_binaries() if binary.name == f"helm-{helm.major}"))
    ran = 0
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "KUBECONFIG": str(server.kubeconfig(tmp_path / "kubeconfig")),
    }
    for command in commands():
        if any(words in command for words in NEED_PODS):
            continue
        # helm 3 owned the CRD until here: the document says to force that once.
        words = [*shlex.split(command), *(["--force-conflicts"] if "--server-side" in command else [])]
        ended = await asyncio.to_thread(
            subprocess.run, words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"
        ran += 1
    assert ran >= 8
