"""Fetches the scripts of the site that the theme would fetch in the reader's browser: `python -m deploy.docs.scripts`.

They come from npm's registry, in the versions and with the digests below. What is there already is not fetched again.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".tools"
TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Script:
    """One file of a package. `sha256` is its own digest."""

    name: str
    package: str
    version: str
    member: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return FOLDER / self.name

    @property
    def site_path(self) -> str:
        """Where it is in the site."""
        return f"assets/javascripts/{self.name}"

    @property
    def url(self) -> str:
        """Its package."""
        return f"https://registry.npmjs.org/{self.package}/-/{self.package}-{self.version}.tgz"

    def is_it(self, content: bytes) -> bool:
        """Whether this is the script."""
        return hashlib.sha256(content).hexdigest() == self.sha256


MERMAID = Script(
    "mermaid.min.js",
    "mermaid",
    "11.16.0",
    "package/dist/mermaid.min.js",
    "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b",
)
"""It draws diagrams."""
IFRAME_WORKER = Script(
    "iframe-worker.js",
    "iframe-worker",
    "1.0.4",
    "package/shim/index.js",
    "e8e412dbcfea9b7e31b5ffa288d7b6035915e714c542f4176a0cdbe262fc9609",
)
"""It lets pages that are read from a folder search."""
SCRIPTS = (MERMAID, IFRAME_WORKER)


def fetch(script: Script) -> None:
    """Fetch a script unless it is there. Ends the program if it is another one than expected."""
    if script.path.exists() and script.is_it(script.path.read_bytes()):
        return
    with urllib.request.urlopen(script.url, timeout=TIMEOUT) as answer:  # noqa: S310  a constant https URL
        package = answer.read()
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        member = archive.extractfile(script.member)
        content = member.read() if member is not None else b""
    if not script.is_it(content):
        sys.exit(f"{script.url} holds another {script.member} than expected")
    FOLDER.mkdir(exist_ok=True)
    script.path.write_bytes(content)


if __name__ == "__main__":
    for each in SCRIPTS:
        fetch(each)
