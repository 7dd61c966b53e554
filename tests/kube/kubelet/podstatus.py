"""What the kubelet reports about a pod: a pure function of its containers' states.

Played: phases and conditions of pods that are always restarted, with init containers and native sidecars (KEP-753).
Checked by `test_pod_states.py`, and against the rules of `pkg/kubelet/status` in Kubernetes. Not played, and refused
(`pod.py`): other restart policies, readiness gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.kube.kubelet.rollout import condition

SIGNALLED = 128
"""Exit codes above this one name the signal that ended the process."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """It does not run yet, or not again."""

    reason: str = "ContainerCreating"
    message: str = ""

    def document(self) -> dict[str, Any]:
        """The state as the API shows it."""
        said = {"reason": self.reason, "message": self.message}
        return {"waiting": {key: value for key, value in said.items() if value}}


@dataclass(frozen=True, slots=True)
class Running:
    """Its process runs."""

    since: str

    def document(self) -> dict[str, Any]:
        """The state as the API shows it."""
        return {"running": {"startedAt": self.since}}


@dataclass(frozen=True, slots=True)
class Terminated:
    """Its process has ended; `code` is negative for a signal."""

    code: int
    started: str
    finished: str
    message: str = ""

    @property
    def exit_code(self) -> int:
        """As container runtimes report it."""
        return SIGNALLED - self.code if self.code < 0 else self.code

    def document(self) -> dict[str, Any]:
        """The state as the API shows it."""
        shown = {
            "exitCode": self.exit_code,
            "reason": "Completed" if self.code == 0 else "Error",
            "startedAt": self.started,
            "finishedAt": self.finished,
        }
        return {"terminated": {**shown, **({"message": self.message} if self.message else {})}}


@dataclass(slots=True)
class Record:
    """What is known of one container."""

    name: str
    image: str
    container_id: str = ""
    state: Waiting | Running | Terminated = field(default_factory=Waiting)
    last: Terminated | None = None
    restarts: int = 0
    started: bool = False
    ready: bool = False
    completes: bool = False
    """It is an init container that has to end well before the next one starts."""

    @property
    def begun(self) -> bool:
        """Whether what comes after it may start, if it comes before the others."""
        if self.completes:
            return isinstance(self.state, Terminated) and self.state.code == 0
        return self.started or self.last is not None

    def document(self) -> dict[str, Any]:
        """Its entry in the pod's status."""
        return {
            "name": self.name,
            "image": self.image,
            "imageID": self.image if self.container_id else "",
            "containerID": self.container_id,
            "state": self.state.document(),
            "lastState": self.last.document() if self.last else {},
            "restartCount": self.restarts,
            "started": self.started,
            "ready": self.ready,
        }


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod runs, and since when."""

    pod_ip: str
    host_ip: str
    started: str


def phase(records: Sequence[Record], *, terminal: bool = False) -> str:
    """The pod's phase; `terminal`: it was told to end and all its processes have."""
    if terminal:
        ended = [each.state for each in records if isinstance(each.state, Terminated)]
        return "Failed" if any(state.code != 0 for state in ended) else "Succeeded"
    waiting = any(isinstance(each.state, Waiting) and each.last is None for each in records)
    return "Pending" if waiting else "Running"


def pod_status(
    pod: Mapping[str, Any],
    records: Sequence[Record],
    place: Place,
    now: str,
    *,
    terminal: bool = False,
    before: Sequence[Record] = (),
) -> dict[str, Any]:
    """The whole status; conditions keep the time of their last transition from the pod's present status.

    `before`: the init containers, native sidecars among them. `terminal`: the pod was told to end and all its processes
    have.
    """
    incomplete = [each.name for each in before if not each.begun]
    stage = "Pending" if incomplete and not terminal else phase(records, terminal=terminal)
    unready = [each.name for each in (*before, *records) if not each.ready]
    done = stage in ("Succeeded", "Failed")
    why = "PodCompleted" if stage == "Succeeded" else "PodFailed" if stage == "Failed" else "ContainersNotReady"
    said = "" if done else f"containers with unready status: [{' '.join(unready)}]"
    ready = ("False", why, said) if done or unready else ("True", "", "")
    conditions = {
        "PodReadyToStartContainers": ("False" if done else "True", "", ""),
        "Initialized": _initialization(incomplete, stage),
        "Ready": ready,
        "ContainersReady": ready,
        "PodScheduled": ("True", "", ""),
    }
    present = pod.get("status", {})
    return {
        "phase": stage,
        "conditions": [_condition(present, kind, *each, now) for kind, each in conditions.items()],
        "hostIP": place.host_ip,
        "hostIPs": [{"ip": place.host_ip}],
        "podIP": place.pod_ip,
        "podIPs": [{"ip": place.pod_ip}],
        "startTime": place.started,
        **({"initContainerStatuses": [each.document() for each in before]} if before else {}),
        "containerStatuses": [each.document() for each in records],
        "qosClass": present.get("qosClass", "BestEffort"),
    }


def _initialization(incomplete: Sequence[str], stage: str) -> tuple[str, str, str]:
    if incomplete:
        return "False", "ContainersNotInitialized", f"containers with incomplete status: [{' '.join(incomplete)}]"
    return "True", "PodCompleted" if stage == "Succeeded" else "", ""


def _condition(
    present: Mapping[str, Any], kind: str, status: str, reason: str, message: str, now: str
) -> dict[str, Any]:
    before = condition(present, kind)
    since = before.get("lastTransitionTime", now) if before.get("status") == status else now
    shown = {"type": kind, "status": status, "lastProbeTime": None, "lastTransitionTime": since}
    said = {"reason": reason, "message": message}
    return {**shown, **{key: value for key, value in said.items() if value}}
