"""A release: its names and version, its chart, and a rehearsal of the release workflow's own steps with real tools.

Stand-ins take the place of cosign and gh, and the image's digest is given. Not covered: the build of the image;
signatures, attestations and the upload to PyPI, which need the host's identity; what the SBOM says of dependencies, as
the wheel is installed here without them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.helm.docs import ROOT
from deploy.release.version import Release, ReleaseError, check, notes, release
from tests.deploy.conftest import Helm, find_helm
from tests.deploy.workflows import EXECUTED, Rehearsal, checkout, load
from tests.processes import free_port

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
DIGEST = f"sha256:{'0123456789abcdef' * 4}"
STATED = ("pyproject.toml", "Dockerfile", "CHANGELOG.md", "deploy/helm/kvcluster/Chart.yaml")


def images(objects: list[dict[str, Any]]) -> set[str]:
    """Every image that these objects run, and the one that the controller is told to run."""
    found = set()
    for item in objects:
        spec = item["spec"] if item["kind"] == "Pod" else item.get("spec", {}).get("template", {}).get("spec", {})
        for container in spec.get("containers", ()):
            found.add(container["image"])
            found.update(v["value"] for v in container.get("env", ()) if v["name"] == "CONTROLLER_IMAGE")
    return found


def objects_of(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


# --- names and version ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "registry", "owner", "expected"),
    [
        pytest.param(
            "v1.2.3",
            "reg.example.com",
            "llm",
            Release("1.2.3", "reg.example.com/llm/kvcluster", "reg.example.com/llm/charts", False),
            id="release",
        ),
        pytest.param(
            "v0.10.0-rc.2",
            "localhost:5000/team",
            "A-Team",
            Release("0.10.0-rc.2", "localhost:5000/team/a-team/kvcluster", "localhost:5000/team/a-team/charts", True),
            id="candidate-and-capitals",
        ),
    ],
)
def test_what_a_release_is_called(tag: str, registry: str, owner: str, expected: Release) -> None:
    assert release(tag, registry, owner) == expected


@pytest.mark.parametrize(
    ("tag", "registry", "owner", "problem"),
    [
        ("1.2.3", "reg.example.com", "llm", "the tag '1.2.3'"),
        ("v1.2", "reg.example.com", "llm", "the tag 'v1.2'"),
        ("v01.2.3", "reg.example.com", "llm", "the tag 'v01.2.3'"),
        ("v1.2.3+local", "reg.example.com", "llm", "the tag"),
        ("v1.2.3", "https://reg.example.com", "llm", "the registry"),
        ("v1.2.3", "", "llm", "the registry ''"),
        ("v1.2.3", "reg.example.com", "l lm", "the owner 'l lm'"),
    ],
)
def test_names_that_cannot_be(tag: str, registry: str, owner: str, problem: str) -> None:
    with pytest.raises(ReleaseError, match=problem):
        release(tag, registry, owner)


@pytest.fixture
def stated(tmp_path: Path) -> Path:
    """The files that state a version, as they are, the changelog with a section for it."""
    for name in STATED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {VERSION} - a date\n\n- news\n\n## 0.0.1\n\n- old\n")
    return tmp_path


def test_every_file_states_the_version_of_the_package(stated: Path) -> None:
    check(stated, VERSION)
    assert notes(stated, VERSION) == "- news"
    assert notes(stated, "0.0.1") == "- old"
    assert not notes(stated, "0.0")


@pytest.mark.parametrize(
    ("name", "old", "problem"),
    [
        pytest.param("pyproject.toml", '\nversion = "{}"', ":7: 'version = \"9.9.9\"' is not the", id="package"),
        pytest.param("deploy/helm/kvcluster/Chart.yaml", "\nversion: {}", ":5: 'version: 9.9.9'", id="chart"),
        pytest.param("deploy/helm/kvcluster/Chart.yaml", "\nappVersion: {}", ":6: 'appVersion: 9.9.9'", id="app"),
        pytest.param("Dockerfile", "\nARG VERSION={}", "'ARG VERSION=9.9.9' is not", id="image"),
        pytest.param("CHANGELOG.md", "\n## {}", ": there is nothing under a heading", id="changelog"),
    ],
)
def test_a_file_that_states_another_version_is_named(stated: Path, name: str, old: str, problem: str) -> None:
    file = stated / name
    file.write_text(file.read_text().replace(old.format(VERSION), old.format("9.9.9")))
    with pytest.raises(ReleaseError) as error:
        check(stated, VERSION)
    [line] = str(error.value).splitlines()
    assert line.startswith(f"{name}:")
    assert problem in line
    assert VERSION in line


def test_a_file_that_states_no_version_is_named(stated: Path) -> None:
    (stated / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(ReleaseError, match=r"Dockerfile: 0 lines match .* exactly one"):
        check(stated, VERSION)


def test_the_command_says_all_that_is_wrong_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "deploy" / "release" / "version.py")]
    arguments = ["v99.0.0", "reg.example.com", "llm", str(tmp_path / "notes.md")]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: v99.0.0 cannot be released\n")
    assert all(f"\n{name}:" in ended.stderr for name in STATED)
    assert not ended.stdout
    assert not (tmp_path / "notes.md").exists()


# --- the chart --------------------------------------------------------------------------------------------


def package(helm: Helm, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "deploy" / "release" / "chart.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=helm.environment())


@pytest.mark.process
def test_the_packaged_chart_names_the_image(helm: Helm, tmp_path: Path) -> None:
    ended = package(helm, "reg.example.com:5000/llm/kvcluster", DIGEST, "7.8.9-rc.1", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    archive = tmp_path / "kvcluster-7.8.9-rc.1.tgz"
    helm.ok("lint", "--strict", archive)
    chart = yaml.safe_load(helm.ok("show", "chart", archive))
    assert (chart["version"], chart["appVersion"]) == ("7.8.9-rc.1", "7.8.9-rc.1")
    objects = objects_of(helm.ok("template", "rel", archive))
    assert images(objects) == {f"reg.example.com:5000/llm/kvcluster@{DIGEST}"}
    assert {item["metadata"]["labels"]["app.kubernetes.io/version"] for item in objects} == {"7.8.9-rc.1"}
    # Who mirrors the image says where, and by which tag or digest; the tag alone is the release's.
    mirrored = helm.ok("template", "rel", archive, "--set=image.repository=mirror.example.com/k,image.digest=")
    assert images(objects_of(mirrored)) == {"mirror.example.com/k:7.8.9-rc.1"}
    # Nothing else differs from the chart in the repository.
    values = yaml.safe_load(helm.ok("show", "values", archive))
    ours = yaml.safe_load((ROOT / "deploy" / "helm" / "kvcluster" / "values.yaml").read_text())
    assert {name: value for name, value in values.items() if name != "image"} == {
        name: value for name, value in ours.items() if name != "image"
    }


@pytest.mark.process
@pytest.mark.parametrize(
    ("image", "digest", "problem"),
    [
        ("kvcluster", DIGEST, "not a registry and a name"),
        ("reg.example.com/llm/kvcluster:1.0.0", DIGEST, "not a registry and a name"),
        ("reg.example.com/llm/kvcluster", "", "not a digest"),
        ("reg.example.com/llm/kvcluster", "sha256:0123", "not a digest"),
    ],
)
def test_an_image_that_no_chart_can_name(helm_4: Helm, tmp_path: Path, image: str, digest: str, problem: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ended = package(helm_4, image, digest, "1.0.0", str(out))
    assert ended.returncode == 1
    assert problem in ended.stderr
    assert not list(out.iterdir())


# --- a rehearsal ------------------------------------------------------------------------------------------

USER, PASSWORD = "user", "secret"
HASH = "$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"
STAND_INS = {
    "cosign": """#!/bin/sh
echo "cosign $*" >> "$CALLS"
[ "$1" = sign ] || echo signed > "$4"
""",
    "gh": """#!/bin/sh
printf '%s\\n' gh "$@" >> "$CALLS"
""",
    # The registry of the tests is without TLS.
    "helm": """#!/bin/sh
PATH=${PATH#*:}
if [ "$1" = push ]; then set -- "$@" --plain-http; fi
exec helm "$@"
""",
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on loopback that asks for credentials; its host and port."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    folder = tmp_path_factory.mktemp("registry")
    (folder / "htpasswd").write_text(f"{USER}:{HASH}\n")
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
        "http": {"addr": address},
    }
    (folder / "config.yml").write_text(yaml.safe_dump(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=7), trust_env=False) as client:
            assert client.get(f"http://{address}/v2/").status_code == 401
        yield address
    finally:
        process.terminate()
        process.wait()


def logged_in(folder: Path, address: str) -> dict[str, str]:
    """The environment in which docker, and nothing else, has logged in at a registry."""
    folder.mkdir()
    credentials = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {address: {"auth": credentials}}}))
    return {"DOCKER_CONFIG": str(folder)}


@pytest.mark.process
def test_a_pushed_chart_is_installed_from_the_registry(helm: Helm, tmp_path: Path, registry: str) -> None:
    image, charts = f"{registry}/llm/kvcluster", f"{registry}/helm-{helm.major}/charts"
    assert package(helm, image, DIGEST, "1.0.0", str(tmp_path)).returncode == 0
    login = logged_in(tmp_path / "docker", registry)
    command = [str(ROOT / "deploy" / "release" / "push.sh"), str(tmp_path / "kvcluster-1.0.0.tgz"), charts]
    pushed = subprocess.run(
        [*command, "--plain-http"], capture_output=True, text=True, check=False, env=helm.environment() | login
    )
    assert pushed.returncode == 0, pushed.stderr
    name, digest = (line.partition("=")[2] for line in pushed.stdout.splitlines())
    assert name == f"{charts}/kvcluster"
    pull = ["--plain-http", f"--username={USER}", f"--password={PASSWORD}"]
    for reference in (["--version=1.0.0", f"oci://{name}"], [f"oci://{name}@{digest}"]):
        assert images(objects_of(helm.ok("template", "rel", *reference, *pull))) == {f"{image}@{DIGEST}"}
    refused = subprocess.run(
        [*command, "--plain-http"], capture_output=True, text=True, check=False, env=helm.environment()
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: helm push: ")
    assert not refused.stdout


@dataclass(frozen=True)
class Rehearsed:
    """What the rehearsal of a release left."""

    dist: Path
    """The files that the release gets."""
    distributions: list[str]
    """Those that PyPI would get."""
    calls: list[str]
    """What cosign and gh were asked."""
    account: str
    """Registry and owner."""


def rehearse(folder: Path, registry: str) -> Rehearsed:
    """Run the steps of release.yml for the version that the repository is at."""
    helm = find_helm(4, folder / "helm")
    (folder / "bin").mkdir()
    for name, script in STAND_INS.items():
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    (folder / "calls").touch()
    source = checkout(folder / "checkout")
    (source / "CHANGELOG.md").write_text(f"# Changelog\n\n## {VERSION}\n\n- news\n")
    github = {"repository_owner": "LLM-Team", "token": "token"}
    environment = helm.environment(folder / "bin") | logged_in(folder / "docker", registry)
    environment |= {
        "CALLS": str(folder / "calls"),
        "GITHUB_REF_NAME": f"v{VERSION}",
        # What the jobs install is there already.
        "MAKEFLAGS": "--assume-old=.venv/.release",
        "PIP_NO_DEPS": "1",
    }
    rehearsal = Rehearsal(load("release.yml"), source, folder / "jobs", github, environment, {"REGISTRY": registry})
    rehearsal.give("image", digest=DIGEST)
    left = {job: rehearsal.run(job) for job in EXECUTED["release.yml"]}
    names = sorted(file.name for file in (left["pypi"] / "dist").iterdir())
    return Rehearsed(
        left["publish"] / "dist", names, (folder / "calls").read_text().splitlines(), f"{registry}/llm-team"
    )


def files_are_those_of_a_release(rehearsed: Rehearsed) -> None:
    python = [f"kvcluster-{VERSION}-py3-none-any.whl", f"kvcluster-{VERSION}.tar.gz"]
    signed = [*python, f"kvcluster-{VERSION}.cdx.json", f"kvcluster-{VERSION}.tgz"]
    names = {file.name for file in rehearsed.dist.iterdir()}
    assert names == {*signed, "SHA256SUMS", "SHA256SUMS.sigstore.json"}
    assert rehearsed.distributions == python
    sums = dict(line.split()[::-1] for line in (rehearsed.dist / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((rehearsed.dist / name).read_bytes()).hexdigest() for name in signed}


def wheel_holds_every_file_of_every_package_and_no_other(rehearsed: Rehearsed) -> None:
    with zipfile.ZipFile(rehearsed.dist / f"kvcluster-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        about = f"kvcluster-{VERSION}.dist-info"
        metadata = wheel.read(f"{about}/METADATA").decode()
        commands = wheel.read(f"{about}/entry_points.txt").decode()
    packages = [glob.removesuffix("*") for glob in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    ours = {
        str(file.relative_to(ROOT))
        for package in packages
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert {name for name in names if not name.startswith(about)} == ours
    assert {"kvcache/py.typed", f"{about}/licenses/LICENSE"} <= names
    assert f"\nVersion: {VERSION}\n" in metadata
    assert all(name in commands for name in PROJECT["project"]["scripts"])


def sbom_names_the_wheel_and_its_licence(rehearsed: Rehearsed) -> None:
    sbom = json.loads((rehearsed.dist / f"kvcluster-{VERSION}.cdx.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    about = sbom["metadata"]["component"]
    assert (about["name"], about["version"]) == ("kvcluster", VERSION)
    assert {licence["license"]["id"] for licence in about["licenses"]} == {"Apache-2.0"}


def chart_names_its_image(rehearsed: Rehearsed, helm: Helm, registry: str) -> None:
    chart = f"oci://{rehearsed.account}/charts/kvcluster"
    login = ["--plain-http", f"--username={USER}", f"--password={PASSWORD}"]
    objects = objects_of(helm.ok("template", "rel", chart, f"--version={VERSION}", *login))
    assert images(objects) == {f"{rehearsed.account}/kvcluster@{DIGEST}"}


def what_is_signed_and_created_is_all_of_it(rehearsed: Rehearsed) -> None:
    sign, sign_files, *create = rehearsed.calls
    assert sign.startswith(f"cosign sign --yes {rehearsed.account}/charts/kvcluster@sha256:")
    assert sign_files == "cosign sign-blob --yes --bundle dist/SHA256SUMS.sigstore.json dist/SHA256SUMS"
    assert create[:4] == ["gh", "release", "create", f"v{VERSION}"]
    assert {f"dist/{file.name}" for file in rehearsed.dist.iterdir()} <= set(create)
    assert create[-5:] == ["--title", f"v{VERSION}", "--notes-file", "notes.md", "--prerelease=false"]


@pytest.mark.process
def test_the_workflow_makes_a_whole_release(tmp_path: Path, registry: str) -> None:
    """One test, because a rehearsal takes many seconds and every process of pytest-xdist would have its own."""
    rehearsed = rehearse(tmp_path, registry)
    files_are_those_of_a_release(rehearsed)
    wheel_holds_every_file_of_every_package_and_no_other(rehearsed)
    sbom_names_the_wheel_and_its_licence(rehearsed)
    for major in (3, 4):
        chart_names_its_image(rehearsed, find_helm(major, tmp_path / f"helm-{major}"), registry)
    what_is_signed_and_created_is_all_of_it(rehearsed)
