"""Helm, in each version that the chart supports, and API servers for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.helm.docs import CHART
from tests.kube.apiserver import FakeApiServer
from tests.kube.backends import ASSETS, Backend, FakeBackend, available
from tests.kube.kubectl import MISSING, helm_binaries
from tests.kube.real import real_api_server

RELEASE, NAMESPACE = "rel", "kvcluster-system"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))


class Helm:
    """Runs one helm binary, with settings and caches of its own."""

    def __init__(self, binary: Path, major: int, home: Path) -> None:
        self._binary = binary
        self.major = major
        folders = {f"HELM_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        self.kubeconfig = Path(os.devnull)
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(home), **folders}

    def use(self, kubeconfig: Path) -> None:
        """Talk to this cluster from now on; to none before."""
        self.kubeconfig = kubeconfig

    def environment(self, *folders: Path) -> dict[str, str]:
        """For programs that call `helm`: it is this one, unless one of these folders has another."""
        folder = Path(self._environment["HOME"]) / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "helm").exists():
            (folder / "helm").symlink_to(self._binary)
        path = os.pathsep.join([*map(str, folders), str(folder), self._environment["PATH"]])
        return self._environment | {"PATH": path, "KUBECONFIG": str(self.kubeconfig)}

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """What it answers, whether or not it succeeds."""
        command = [str(self._binary), *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=self._environment | {"KUBECONFIG": str(self.kubeconfig)},
        )

    def ok(self, *arguments: str | Path) -> str:
        """What it prints; fails the test unless it succeeds."""
        ended = self.run(*arguments)
        assert ended.returncode == 0, ended.stderr + ended.stdout
        return ended.stdout

    def template(self, *arguments: str | Path, release: str = RELEASE) -> list[dict[str, Any]]:
        """The objects of a release, its tests included."""
        text = self.ok("template", release, CHART, "--namespace", NAMESPACE, *arguments)
        return [document for document in yaml.safe_load_all(text) if document]


def find_helm(major: int, home: Path) -> Helm:
    """Helm of this major version; skips the test where it is not."""
    found = [binary for binary in helm_binaries() if binary.name == f"helm-{major}"]
    if not found:
        pytest.skip(MISSING)
    return Helm(found[0], major, home)


@pytest.fixture(params=[3, 4], ids=["helm-3", "helm-4"])
def helm(request: pytest.FixtureRequest, tmp_path: Path) -> Helm:
    return find_helm(int(request.param), tmp_path / "helm")


@pytest.fixture
def helm_4(tmp_path: Path) -> Helm:
    return find_helm(4, tmp_path / "helm-4")


@pytest.fixture(params=CI_VALUES, ids=lambda file: file.name.removesuffix("-values.yaml"))
def ci_values(request: pytest.FixtureRequest) -> Path:
    """Each of the chart's sets of values for tests."""
    return Path(request.param)


@pytest.fixture(params=available())
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    """An API server of the test's own: a fake one, and a real one where there is one."""
    if request.param == "real":
        folder = tmp_path / "kubernetes"
        folder.mkdir()
        with real_api_server(Path(os.environ[ASSETS]), folder) as backend:
            yield backend
        return
    fake = FakeApiServer()
    await fake.start()
    yield FakeBackend(fake)
    await fake.stop()
