"""Names a release after its tag, and refuses a tag whose version is not the one that every file states.

    python3 deploy/release/version.py TAG REGISTRY OWNER NOTES

TAG is `v` and a semantic version (`v0.2.0`, `v0.2.0-rc.1`); REGISTRY is the host that images and charts are pushed to,
OWNER the account there. Prints what the release is called, one `NAME=VALUE` a line, and writes the section of the
changelog to NOTES. It needs nothing but the standard library, as it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAG = re.compile(r"v(?P<version>(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)(?P<candidate>-rc\.[1-9]\d*)?)")
REGISTRY = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*(?::\d+)?(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*")
OWNER = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*")
STATED = {
    "pyproject.toml": [r'^version = "(.*)"$'],
    "deploy/helm/kvcluster/Chart.yaml": [r"^version: (.*)$", r"^appVersion: (.*)$"],
    "Dockerfile": [r"^ARG VERSION=(.*)$"],
}
"""The lines that state the version, file by file; each is there exactly once."""


class ReleaseError(Exception):
    """What keeps a tag from being released: one problem a line, each with what to change."""


@dataclass(frozen=True, slots=True)
class Release:
    """What a release is called."""

    version: str
    image: str
    """Registry and name of the image, without a tag."""
    charts: str
    """Registry and folder of the chart, without `oci://`."""
    prerelease: bool

    def lines(self) -> str:
        """As a workflow's steps pass values on."""
        prerelease = str(self.prerelease).lower()
        return f"version={self.version}\nimage={self.image}\ncharts={self.charts}\nprerelease={prerelease}\n"


def release(tag: str, registry: str, owner: str) -> Release:
    """What the release of this tag is called; an owner's capitals are made small, as registries have none.

    Raises ReleaseError for a tag, registry or owner that cannot be part of these names.
    """
    parts = TAG.fullmatch(tag)
    if parts is None:
        raise ReleaseError(f"the tag {tag!r} is not v and a version such as v0.2.0 or v0.2.0-rc.1")
    owner = owner.lower()
    for what, name, pattern in (("registry", registry, REGISTRY), ("owner", owner, OWNER)):
        if not pattern.fullmatch(name):
            raise ReleaseError(f"the {what} {name!r} cannot be part of an image's name")
    account = f"{registry}/{owner}"
    return Release(parts["version"], f"{account}/kvcluster", f"{account}/charts", parts["candidate"] is not None)


def notes(root: Path, version: str) -> str:
    """The changelog's section of this version, without its heading; empty when there is none."""
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(version)}(?: [^\n]*)?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return section[1].strip() if section else ""


def check(root: Path, version: str) -> None:
    """Raises ReleaseError unless every file in this folder states this version and the changelog describes it."""
    problems = []
    for name, patterns in STATED.items():
        text = (root / name).read_text(encoding="utf-8")
        for pattern in patterns:
            found = list(re.finditer(pattern, text, re.MULTILINE))
            if len(found) != 1:
                problems.append(f"{name}: {len(found)} lines match {pattern}; exactly one must state the version")
            elif found[0][1] != version:
                line = text[: found[0].start()].count("\n") + 1
                problems.append(f"{name}:{line}: {found[0][0]!r} is not the tag's version; make it {version}")
    if not notes(root, version):
        problems.append(f"CHANGELOG.md: there is nothing under a heading '## {version}'; move what is unreleased there")
    if problems:
        raise ReleaseError("\n".join(problems))


def main(arguments: list[str]) -> None:
    """The command line above."""
    if len(arguments) != 4:
        raise SystemExit("usage: version.py TAG REGISTRY OWNER NOTES")
    tag, registry, owner, path = arguments
    try:
        found = release(tag, registry, owner)
        check(ROOT, found.version)
    except ReleaseError as error:
        raise SystemExit(f"error: {tag} cannot be released\n{error}") from None
    Path(path).write_text(notes(ROOT, found.version) + "\n", encoding="utf-8")
    sys.stdout.write(found.lines())


if __name__ == "__main__":
    main(sys.argv[1:])
