"""What is to be read from pods: whether they are ready, and what they suffer from."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controller.objects.names import Component
from controller.status import raw
from controller.status.raw import Raw
from controller.status.reasons import Reason

COMPONENT_LABEL = "app.kubernetes.io/component"

RECOVERED_AFTER = timedelta(seconds=60)
"""A pod that has crash-looped and is ready again counts as sound from then on: until then it may end once more."""
FORGIVEN_AFTER = timedelta(minutes=10)
"""As the kubelet's back-off: what ended longer ago is no part of a loop."""
QUOTED = 400
"""Most characters of someone else's message that are repeated."""

_PULL = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
_START = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "PreCreateHookError",
        "PreStartHookError",
        "PostStartHookError",
        "StartError",
        "ContainerCannotRun",
    }
)
_BACK_OFF = "Back-off pulling image"
_PULL_ADVICE = "Check the image's name and tag, and that the nodes can reach its registry and may pull from it."


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something wrong that will not pass by itself."""

    reason: Reason
    component: Component
    subject: str
    """Name of the pod (or Deployment) that has it."""
    message: str
    vague: bool = False
    """The kubelet names no cause at the moment (it does so in turn); what it said before is worth more."""


def component_of(pod: Raw) -> str:
    """The pod's component; empty for a foreign one."""
    return raw.text(pod, "metadata", "labels", COMPONENT_LABEL)


def active(pods: Iterable[Raw], component: Component) -> list[Raw]:
    """The pods of a component that are neither over nor being deleted, by name."""
    found = [
        pod
        for pod in pods
        if component_of(pod) == component
        and raw.at(pod, "metadata", "deletionTimestamp") is None
        and raw.text(pod, "status", "phase") not in ("Failed", "Succeeded")
    ]
    return sorted(found, key=raw.name)


def is_ready(pod: Raw) -> bool:
    """Whether a Service sends requests to it."""
    return raw.condition(pod, "Ready").get("status") == "True" and raw.at(pod, "metadata", "deletionTimestamp") is None


def still_serving(pods: Iterable[Raw], component: Component) -> int:
    """How many pods of a component terminate and are ready: a Service sends requests to them where there is no other
    (KEP-1669)."""
    return sum(
        component_of(pod) == component
        and raw.at(pod, "metadata", "deletionTimestamp") is not None
        and raw.condition(pod, "Ready").get("status") == "True"
        for pod in pods
    )


def ready_for(pod: Raw, now: datetime) -> timedelta | None:
    """How long it has been ready; None when it is not."""
    if not is_ready(pod):
        return None
    since = raw.when(raw.condition(pod, "Ready").get("lastTransitionTime"))
    return timedelta.max if since is None else now - since


def containers(pod: Raw) -> list[Raw]:
    """Status of its containers, the initial ones first."""
    return [*raw.objects(pod, "status", "initContainerStatuses"), *raw.objects(pod, "status", "containerStatuses")]


def state_of(pod: Raw) -> str:
    """What it is doing, in a few words."""
    if raw.at(pod, "metadata", "deletionTimestamp") is not None:
        return "terminating"
    if is_ready(pod):
        return "ready"
    for status in containers(pod):
        for path in (("state", "waiting", "reason"), ("state", "terminated", "reason")):
            reason = raw.text(status, *path)
            # An initial container that is over has done its work.
            if reason and reason != "Completed":
                return reason
    phase = raw.text(pod, "status", "phase")
    return "runs, not ready" if phase == "Running" else phase or "Pending"


def pod_trouble(pod: Raw, namespace: str, now: datetime) -> Trouble | None:
    """What the pod suffers from, if anything."""
    component, name = Component(component_of(pod)), raw.name(pod)
    for status in containers(pod):
        waiting = raw.mapping(status, "state", "waiting")
        reason, said = raw.text(waiting, "reason"), raw.text(waiting, "message")
        if reason in _PULL:
            message, vague = _pull_failure(name, status, reason, said)
            return Trouble(Reason.IMAGE_PULL_FAILED, component, name, message, vague)
        if reason in _START:
            return Trouble(Reason.CANNOT_START, component, name, _start_failure(name, status, reason, said))
        if _loops(pod, status, now):
            return Trouble(Reason.CRASH_LOOPING, component, name, _crash(name, namespace, status))
    scheduled = raw.condition(pod, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        said = quoted(raw.text(scheduled, "message"))
        message = (
            f"No node takes pod {name}: {said} Add or free nodes, or change the resources, nodeSelector, tolerations "
            f"or affinity of spec.{_section(component)}."
        )
        return Trouble(Reason.UNSCHEDULABLE, component, name, message)
    return None


def sharpened(trouble: Trouble, earlier: Iterable[str]) -> Trouble:
    """A vague trouble in the words in which one of these earlier messages told it, if one did."""
    if not trouble.vague:
        return trouble
    head = f"{trouble.message.removesuffix(f'. {_PULL_ADVICE}')}: "
    for message in earlier:
        start = message.find(head)
        end = message.find(_PULL_ADVICE, start)
        if start >= 0 and end >= 0:
            return replace(trouble, message=message[start : end + len(_PULL_ADVICE)], vague=False)
    return trouble


def quoted(message: str) -> str:
    """Someone else's message as a sentence of our own: one line, cut to a readable length, with a full stop."""
    text = " ".join(message.split()) or "no reason is given"
    text = text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _section(component: Component) -> str:
    return "workers" if component is Component.WORKER else "router"


def _pull_failure(pod: str, status: Raw, reason: str, said: str) -> tuple[str, bool]:
    image = raw.text(status, "image")
    if said.startswith(_BACK_OFF):
        # `Back-off pulling image "x"`, since 1.31 with `: ErrImagePull: the cause`.
        said = said.partition(": ")[2].removeprefix("ErrImagePull: ")
    cause = f": {quoted(said)}" if said else "." if reason == "ImagePullBackOff" else f" ({reason})."
    return f"Pod {pod} cannot pull image {image}{cause} {_PULL_ADVICE}", not said


def _start_failure(pod: str, status: Raw, reason: str, said: str) -> str:
    return f"Container {raw.text(status, 'name')} of pod {pod} cannot start ({reason}): {quoted(said)}"


def _loops(pod: Raw, status: Raw, now: datetime) -> bool:
    if raw.text(status, "state", "waiting", "reason") == "CrashLoopBackOff":
        return True
    restarts = raw.number(status, "restartCount")
    if (over := raw.mapping(status, "state", "terminated")) and raw.number(over, "exitCode") != 0:
        return restarts >= 1
    if restarts < 2:
        return False
    ready = ready_for(pod, now)
    ended = raw.when(raw.at(status, "lastState", "terminated", "finishedAt"))
    return (ready is None or ready < RECOVERED_AFTER) and ended is not None and now - ended < FORGIVEN_AFTER


def _crash(pod: str, namespace: str, status: Raw) -> str:
    container = raw.text(status, "name")
    over = raw.mapping(status, "lastState", "terminated") or raw.mapping(status, "state", "terminated")
    head = f"Container {container} of pod {pod} keeps ending"
    logs = f"kubectl logs -n {namespace} {pod} -c {container} --previous shows why."
    if not over:
        return f"{head}. {logs}"
    if raw.text(over, "reason") == "OOMKilled":
        return f"{head}: it needs more memory than its limit (OOMKilled{_code(over)}). Raise its memory limit."
    last_words = raw.text(over, "message")
    words = f" Its last words: {quoted(last_words)}" if last_words else ""
    return f"{head}: last time with {_ending(over)}.{words} {logs}"


def _code(over: Raw) -> str:
    return f", exit code {over['exitCode']}" if type(over.get("exitCode")) is int else ""


def _ending(over: Raw) -> str:
    """`exit code 3`, `exit code 137 (SIGKILL)`."""
    code = raw.number(over, "exitCode")
    number = raw.number(over, "signal") or (code - 128 if code > 128 else 0)
    if not number:
        return f"exit code {code}"
    try:
        return f"exit code {code} ({signal.Signals(number).name})"
    except ValueError:
        return f"exit code {code} (signal {number})"
