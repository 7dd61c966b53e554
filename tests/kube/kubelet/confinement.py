"""Who a container's process is and what it sees of the file system: Kubernetes' rules, as functions of the specs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tests.kube.kubelet.environment import ConfigError

Spec = Mapping[str, Any]

ROOT = Path(__file__).parents[3]
"""The repository: what the image has installed comes from here."""
SANDBOX = Path(__file__).with_name("sandbox.py")
TOKEN_MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


class Isolation(Enum):
    """How much of a container's surroundings this machine lets the node make."""

    FULL = "full"
    """Root on Linux: users, capabilities, volumes, read-only roots, and the token where Kubernetes mounts it."""
    NONE = "none"
    """Processes are this user's and share its file system; a token that is due comes by KUBECONFIG."""


@dataclass(frozen=True, slots=True)
class User:
    """Of a container's process."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder of this machine, and where the container finds it."""

    source: Path
    target: str
    read_only: bool = False


def _security(pod: Spec, container: Spec, field: str) -> Any:
    """A field that the container's security context overrides."""
    for context in (container.get("securityContext"), pod["spec"].get("securityContext")):
        if field in (context or {}):
            return (context or {})[field]
    return None


def user(pod: Spec, container: Spec, image: int) -> User:
    """Who runs: the specs' say, else the image's uid. Raises `ConfigError` where that is root and may not be."""
    uid = _security(pod, container, "runAsUser")
    gid = _security(pod, container, "runAsGroup")
    if uid is None and _security(pod, container, "runAsNonRoot") and image == 0:
        name, metadata = container["name"], pod["metadata"]
        where = f'pod: "{metadata["name"]}_{metadata["namespace"]}({metadata["uid"]})", container: {name}'
        raise ConfigError(f"container has runAsNonRoot and image will run as root ({where})")
    if uid == 0 and _security(pod, container, "runAsNonRoot"):
        raise ConfigError("container's runAsUser breaks non-root policy")
    context = pod["spec"].get("securityContext") or {}
    extra = [*(context.get("supplementalGroups") or ()), *([context["fsGroup"]] if "fsGroup" in context else [])]
    # The kubelet passes on the uid alone, which has no entry in /etc/passwd that would name a group: then it is root's.
    group = gid or 0
    return User(image if uid is None else uid, group, (group, *extra))


def token_is_mounted(pod: Spec, account: Spec) -> bool:
    """Whether the ServiceAccount admission gives the pod a token: the pod has the last word, then the account."""
    for owner in (pod["spec"], account):
        said = owner.get("automountServiceAccountToken")
        if said is not None:
            return bool(said)
    return True


def launch(pod: Spec, container: Spec, who: User, mounts: list[Mount], isolation: Isolation) -> str:
    """What `sandbox.py` is told of this container."""
    context = container.get("securityContext") or {}
    dropped = [each.upper() for each in (context.get("capabilities") or {}).get("drop") or ()]
    return json.dumps(
        {
            "parent": os.getpid(),
            "isolate": isolation is Isolation.FULL,
            "uid": who.uid,
            "gid": who.gid,
            "groups": list(who.groups),
            "drop": "ALL" in dropped,
            "no_new_privs": context.get("allowPrivilegeEscalation") is False,
            "read_only": bool(context.get("readOnlyRootFilesystem")),
            "mounts": [[str(each.source), each.target, each.read_only] for each in mounts],
            "keep": sorted({str(ROOT), sys.prefix, sys.base_prefix}),
        }
    )


def isolation() -> Isolation:
    """What this machine allows: found out by trying. Raises `RuntimeError` where trying fails for another reason."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return Isolation.NONE
    context = {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    spec = launch({}, {"securityContext": context}, User(65532, 65532, ()), [], Isolation.FULL)
    command = [sys.executable, "-ES", str(SANDBOX), spec, sys.executable, "-ES", "-c", ""]
    tried = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if tried.returncode == 0:
        return Isolation.FULL
    # Root in a container that was given no right to mount.
    if re.search(r"(unshare|mount\S* \S+): Operation not permitted", tried.stderr):
        return Isolation.NONE
    raise RuntimeError(f"containers cannot be isolated: {tried.stderr}")
