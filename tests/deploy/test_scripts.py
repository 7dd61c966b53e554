"""The shell scripts: clean, and `make kind` with stand-ins for the programs it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.helm.docs import ROOT

pytestmark = pytest.mark.process

SCRIPTS = sorted([*(ROOT / "deploy").rglob("*.sh"), ROOT / ".ci" / "run"])
TOOLS = ("docker", "kind", "kubectl", "helm", "curl")
NEEDED = ("bash", "env", "dirname", "grep", "cat", "sleep")
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
  "kind get clusters") echo "$CLUSTERS" ;;
  "docker image inspect"*) echo sha256:0123456789abcdef0123456789abcdef ;;
  *" wait "*) exit "$WAIT_EXIT" ;;
esac
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_shellcheck(script: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    assert os.access(script, os.X_OK) or script.parent.name == ".ci"
    checked = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


class Up:
    """Runs deploy/kind/up.sh where only stand-ins can be found."""

    def __init__(self, folder: Path) -> None:
        self._bin = folder / "bin"
        self._bin.mkdir()
        self._log = folder / "calls"
        self._log.touch()
        for name in (*NEEDED, "basename"):
            (self._bin / name).symlink_to(str(shutil.which(name)))
        for name in TOOLS:
            (self._bin / name).write_text(STAND_IN)
            (self._bin / name).chmod(0o755)

    def without(self, tool: str) -> None:
        (self._bin / tool).unlink()

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"PATH": str(self._bin), "CALLS": str(self._log), "CLUSTERS": "", "WAIT_EXIT": "0", **environment}
        command = [ROOT / "deploy" / "kind" / "up.sh"]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=settings)

    def calls(self) -> list[str]:
        return self._log.read_text().splitlines()


def test_creates_builds_loads_installs_applies_and_asks(tmp_path: Path) -> None:
    up = Up(tmp_path)
    ended = up.run()
    assert ended.returncode == 0, ended.stderr
    expected = [
        "docker info",
        "kind get clusters",
        "kind create cluster --name kvcluster",
        "docker build",
        "docker image inspect",
        "docker tag kvcluster:build kvcluster:kind-0123456789ab",
        "kind load docker-image kvcluster:kind-0123456789ab --name kvcluster",
        "helm --kube-context kind-kvcluster upgrade --install kvcluster deploy/helm/kvcluster",
        "helm --kube-context kind-kvcluster test kvcluster",
        "kubectl --context kind-kvcluster apply --filename examples/minimal.yaml",
        "kubectl --context kind-kvcluster wait --for=condition=Ready kvcluster/minimal",
        "kubectl --context kind-kvcluster get kvcluster",
    ]
    calls = up.calls()
    assert len(calls) == len(expected) + 2
    for call, start in zip(calls, expected, strict=False):
        assert call.startswith(start)
    # One of these runs in the background.
    assert {call.split()[0] for call in calls[-2:]} == {"kubectl", "curl"}
    assert "image.tag=kind-0123456789ab" in calls[7]


def test_a_cluster_that_is_there_is_kept(tmp_path: Path) -> None:
    up = Up(tmp_path)
    assert up.run(CLUSTERS="mine", KIND_CLUSTER="mine").returncode == 0
    assert not [call for call in up.calls() if call.startswith("kind create")]


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    up = Up(tmp_path)
    up.without("kind")
    up.without("helm")
    ended = up.run()
    assert ended.returncode == 1
    assert "not installed: kind helm" in ended.stderr
    assert not up.calls()


def test_a_cluster_that_does_not_get_ready_is_described(tmp_path: Path) -> None:
    up = Up(tmp_path)
    ended = up.run(WAIT_EXIT="1")
    assert ended.returncode == 1
    assert "did not become ready" in ended.stderr
    assert any("describe kvcluster minimal" in call for call in up.calls())


def test_the_cluster_has_nodes_to_spread_over() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "kind" / "kind.yaml").read_text(encoding="utf-8"))
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]
