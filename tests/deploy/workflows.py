"""The workflows of .github as data, and a rehearsal of their jobs on this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from deploy.helm.docs import ROOT

FOLDER = ROOT / ".github" / "workflows"
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")

EXECUTED = {"kind.yml": ("kind",), "release.yml": ("version", "files", "publish", "pypi")}
"""The jobs whose steps tests run, in test_scripts.py and test_release.py."""

Workflow = dict[str, Any]


def load(name: str) -> Workflow:
    """The workflow in this file."""
    # YAML 1.1 reads the key `on` as true.
    text = re.sub(r"^on:", '"on":', (FOLDER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    content: Workflow = yaml.safe_load(text)
    return content


class Rehearsal:
    """Runs the `run` steps of a workflow's jobs, each job in a checkout of its own, as the host's runner does.

    Of the actions it plays those that carry files from job to job; any other one's outputs are given. Of expressions it
    knows names, strings and `||`; a name that nothing has set fails, save those that a repository may leave unset
    (`vars`, `secrets`). Conditions, matrices and permissions are not looked at.
    """

    def __init__(
        self,
        workflow: Workflow,
        source: Path,
        folder: Path,
        github: Mapping[str, str],
        environment: Mapping[str, str],
        variables: Mapping[str, str],
    ) -> None:
        self._jobs: dict[str, Any] = workflow["jobs"]
        self._source = source
        self._folder = folder
        self._environment = dict(environment)
        self._contexts: dict[str, Any] = {"github": github, "vars": variables, "secrets": {}, "needs": {}}

    def give(self, job: str, **outputs: str) -> None:
        """Take a job as done, with these outputs."""
        self._contexts["needs"][job] = {"outputs": outputs}

    def run(self, job: str) -> Path:
        """Run a job to its end; its checkout as it leaves it."""
        definition = self._jobs[job]
        checkout = self._folder / job
        if any(step.get("uses", "").startswith("actions/checkout@") for step in definition["steps"]):
            shutil.copytree(self._source, checkout, symlinks=True)
        else:
            checkout.mkdir(parents=True)
        steps: dict[str, Any] = {}
        contexts = self._contexts | {"steps": steps}
        for step in definition["steps"]:
            outputs: dict[str, str] = {}
            if "run" in step:
                variables = {**definition.get("env", {}), **step.get("env", {})}
                outputs = self._step(checkout, step["run"], {k: evaluate(v, contexts) for k, v in variables.items()})
            elif step["uses"].startswith("actions/upload-artifact@"):
                there, kept = checkout / step["with"]["path"], self._folder / "artifacts" / step["with"]["name"]
                if there.is_dir():
                    shutil.copytree(there, kept)
                else:
                    kept.mkdir(parents=True)
                    shutil.copy(there, kept)
            elif step["uses"].startswith("actions/download-artifact@"):
                kept = self._folder / "artifacts" / step["with"]["name"]
                shutil.copytree(kept, checkout / step["with"].get("path", "."), dirs_exist_ok=True)
            if "id" in step:
                steps[step["id"]] = {"outputs": outputs}
        self.give(job, **{name: evaluate(value, contexts) for name, value in definition.get("outputs", {}).items()})
        return checkout

    def _step(self, checkout: Path, command: str, variables: dict[str, str]) -> dict[str, str]:
        output = self._folder / "output"
        output.write_text("")
        environment = self._environment | variables | {"GITHUB_OUTPUT": str(output)}
        ended = subprocess.run(
            ["bash", "-e", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
        return dict(line.split("=", 1) for line in output.read_text().splitlines())


def evaluate(text: str, contexts: Mapping[str, Any]) -> str:
    """A text with its expressions filled in."""
    return EXPRESSION.sub(lambda found: _first(found[1], contexts), text)


def _first(alternatives: str, contexts: Mapping[str, Any]) -> str:
    for alternative in map(str.strip, alternatives.split("||")):
        if alternative.startswith("'"):
            value: Any = alternative.strip("'")
        elif alternative.startswith(("vars.", "secrets.")):
            context, name = alternative.split(".")
            value = contexts[context].get(name, "")
        else:
            value = reduce(lambda context, name: context[name], alternative.split("."), contexts)
        if value:
            return str(value)
    return ""


def checkout(target: Path) -> Path:
    """A copy of this repository as far as jobs need it, with the environment of the tests in it."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        at_top = Path(folder) == ROOT
        return {
            name
            for name in names
            if name == "__pycache__"
            or (at_top and (name.startswith(".") or name in ("tests", "docs", "dist", "build")))
        }

    shutil.copytree(ROOT, target, ignore=ignored)
    (target / ".venv").symlink_to(sys.prefix)
    return target
