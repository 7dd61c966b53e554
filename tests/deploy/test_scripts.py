"""The shell scripts: clean, and those of deploy/kind with stand-ins for the programs they call.

Not covered: whether a cluster comes up, which takes docker (.github/workflows/kind.yml).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.helm.docs import ROOT
from tests.deploy.workflows import EXECUTED, Rehearsal, checkout, load

pytestmark = pytest.mark.process

SCRIPTS = sorted([*(ROOT / "deploy").rglob("*.sh"), ROOT / ".ci" / "run"])
TOOLS = ("docker", "kind", "kubectl", "helm", "curl")
NEEDED = ("bash", "env", "dirname", "grep", "cat", "sleep", "mkdir", "make", "sh")
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
  "kind get clusters") echo "$CLUSTERS" ;;
  "docker image inspect"*) echo sha256:0123456789abcdef0123456789abcdef ;;
  *" wait "*) exit "$WAIT_EXIT" ;;
  "kind export"*) exit 1 ;;
  *" describe "*) echo described ;;
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


class Kind:
    """Runs a script of deploy/kind where only stand-ins can be found."""

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

    def environment(self, **settings: str) -> dict[str, str]:
        return {"PATH": str(self._bin), "CALLS": str(self._log), "CLUSTERS": "", "WAIT_EXIT": "0", **settings}

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "deploy" / "kind" / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment(**settings))

    def calls(self) -> list[str]:
        return self._log.read_text().splitlines()


def test_creates_builds_loads_installs_applies_and_asks(tmp_path: Path) -> None:
    kind = Kind(tmp_path)
    ended = kind.run("up.sh")
    assert ended.returncode == 0, ended.stderr
    expected = [
        "docker info", "kind get clusters", "kind create cluster --name kvcluster", "docker build",
        "docker image inspect", "docker tag kvcluster:build kvcluster:kind-0123456789ab",
        "kind load docker-image kvcluster:kind-0123456789ab --name kvcluster",
        "helm --kube-context kind-kvcluster upgrade --install kvcluster deploy/helm/kvcluster",
        "helm --kube-context kind-kvcluster test kvcluster",
        "kubectl --context kind-kvcluster apply --filename examples/minimal.yaml",
        "kubectl --context kind-kvcluster wait --for=condition=Ready kvcluster/minimal",
        "kubectl --context kind-kvcluster get kvcluster",
    ]  # fmt: skip
    calls = kind.calls()
    assert len(calls) == len(expected) + 2
    for call, start in zip(calls, expected, strict=False):
        assert call.startswith(start)
    # One of these runs in the background.
    assert {call.split()[0] for call in calls[-2:]} == {"kubectl", "curl"}
    assert "image.tag=kind-0123456789ab" in calls[7]


def test_a_cluster_that_is_there_is_kept(tmp_path: Path) -> None:
    kind = Kind(tmp_path)
    assert kind.run("up.sh", CLUSTERS="mine", KIND_CLUSTER="mine").returncode == 0
    assert not [call for call in kind.calls() if call.startswith("kind create")]


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    kind = Kind(tmp_path)
    kind.without("kind")
    kind.without("helm")
    ended = kind.run("up.sh")
    assert ended.returncode == 1
    assert "not installed: kind helm" in ended.stderr
    assert not kind.calls()


def test_a_cluster_that_does_not_get_ready_is_described(tmp_path: Path) -> None:
    kind = Kind(tmp_path)
    ended = kind.run("up.sh", WAIT_EXIT="1")
    assert ended.returncode == 1
    assert "did not become ready" in ended.stderr
    assert any("describe kvcluster minimal" in call for call in kind.calls())


def test_the_cluster_has_nodes_to_spread_over() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "kind" / "kind.yaml").read_text(encoding="utf-8"))
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]


def test_the_cluster_is_removed(tmp_path: Path) -> None:
    kind = Kind(tmp_path)
    assert kind.run("down.sh", KIND_CLUSTER="mine").returncode == 0
    assert kind.calls() == ["kind delete cluster --name mine"]


def test_logs_are_collected_though_a_part_cannot_be_had(tmp_path: Path) -> None:
    kind = Kind(tmp_path)
    ended = kind.run("logs.sh", str(tmp_path / "logs"))
    assert ended.returncode == 0, ended.stderr
    assert kind.calls()[0] == f"kind export logs {tmp_path}/logs/nodes --name kvcluster"
    assert all(call.startswith("kubectl --context kind-kvcluster ") for call in kind.calls()[1:])
    assert (tmp_path / "logs" / "described.txt").read_text() == "described\n"
    assert {file.name for file in (tmp_path / "logs").iterdir()} == {
        "controller.log",
        "described.txt",
        "events.txt",
        "objects.txt",
    }


def test_the_steps_of_the_workflow(tmp_path: Path) -> None:
    kind = Kind(tmp_path)
    source = checkout(tmp_path / "checkout")
    rehearsal = Rehearsal(load("kind.yml"), source, tmp_path / "jobs", {}, kind.environment(), {})
    for job in EXECUTED["kind.yml"]:
        rehearsal.run(job)
    calls = [call for call in kind.calls() if call.startswith("kind ") and " get " not in call]
    verbs = [call.split()[1] for call in calls]
    assert verbs == ["create", "load", "export", "delete"]
    assert list((tmp_path / "jobs" / "artifacts" / "kind-logs").iterdir())
