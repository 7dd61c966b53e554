"""The processes of containers: who they are and what they see, how they start and end. They never outlive this one.

Played: the rules of users, groups, capabilities and tokens, by `sandbox.py`, which becomes the container's command.
Checked by `test_container_rules.py` and `test_pod_surroundings.py`, and against kubelet 1.36 with containerd 1.6.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tests.kube.kubelet.environment import ConfigError, local_command

Spec = Mapping[str, Any]
ROOT = Path(__file__).parents[3]
"""The repository: what the image has installed comes from here."""
SANDBOX = Path(__file__).with_name("sandbox.py")
TOKEN_MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def wrapped(argv: Sequence[str], launch: str, parent_pipe: int) -> list[str]:
    """The command line that runs `argv` as `launch` says (`launch`), and such that it ends with us."""
    command = local_command(argv, sys.executable)
    if command[0] == sys.executable and command[1:2] == ["-m"]:
        command = [sys.executable, "-m", "controller.local.parent_guard", str(parent_pipe), *command[2:]]
    # By its file and without site-packages: it starts in no time.
    return [sys.executable, "-ES", str(SANDBOX), launch, *command]


async def spawn(argv: Sequence[str], env: Mapping[str, str], launch: str, log: Path, parent_pipe: int) -> Process:
    """Starts a command in a process group of its own, what it writes goes to the end of `log`. Raises `OSError`."""
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *wrapped(argv, launch, parent_pipe),
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
            env=dict(env),
            cwd=ROOT,
            pass_fds=(parent_pipe,),
            start_new_session=True,
        )


def signal_group(process: Process, number: signal.Signals) -> None:
    """Sends a signal to the process and to all it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


async def ended(process: Process) -> None:
    """Kills the process, unless it has ended, and returns when it is gone: a cancellation meanwhile has to wait."""
    signal_group(process, signal.SIGKILL)
    gone = asyncio.ensure_future(process.wait())
    cancelled: asyncio.CancelledError | None = None
    while not gone.done():
        try:
            await asyncio.shield(gone)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


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
