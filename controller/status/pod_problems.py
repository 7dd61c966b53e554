"""What keeps pods from running that will not pass by itself: images that cannot be pulled, crash loops, quotas."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controller.objects.names import Component
from controller.status import raw
from controller.status.observed import Observed
from controller.status.pods import active, component_of, containers, ready_for
from controller.status.raw import Raw
from controller.status.reasons import SEVERITY, ConditionReason

RECOVERED_AFTER = timedelta(seconds=60)
"""A pod that crash-looped counts as recovered once it has been ready for so long: before, it may crash once more."""
FORGIVEN_AFTER = timedelta(minutes=10)
"""A container that ended longer ago is no part of a crash loop. The kubelet resets its back-off after the same time."""
MAX_QUOTED = 400
"""Characters of a message by another component that are repeated at most."""

_PULL_REASONS = frozenset(
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
_START_REASONS = frozenset(
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
class PodProblem:
    """Something that keeps a pod from running and that will not pass by itself."""

    reason: ConditionReason
    component: Component
    subject: str
    """Name of the pod, or of the Deployment that cannot create its pods."""
    message: str
    cause_missing: bool = False
    """The kubelet gives no cause at the moment: its messages alternate. An earlier message may have given one."""


def pod_problems(observed: Observed, earlier: Sequence[str], now: datetime) -> tuple[PodProblem, ...]:
    """The problems of all pods, and of Deployments that cannot create pods, the gravest first.

    `earlier` are the messages of the last status.
    """
    found = [problem for component in Component if (problem := _creation_refused(observed, component)) is not None]
    for component in Component:
        for pod in active(observed.pods, component):
            problem = find_pod_problem(pod, observed.namespace, now)
            if problem is not None:
                found.append(_with_earlier_cause(problem, earlier))
    return tuple(sorted(found, key=lambda each: (SEVERITY.index(each.reason), each.component, each.subject)))


def find_pod_problem(pod: Raw, namespace: str, now: datetime) -> PodProblem | None:
    """The problem of one pod; None when it has none."""
    component, name = Component(component_of(pod)), raw.name(pod)
    for status in containers(pod):
        waiting = raw.mapping(status, "state", "waiting")
        reason, said = raw.text(waiting, "reason"), raw.text(waiting, "message")
        if reason in _PULL_REASONS:
            message, cause_missing = _pull_failure(name, status, reason, said)
            return PodProblem(ConditionReason.IMAGE_PULL_FAILED, component, name, message, cause_missing)
        if reason in _START_REASONS:
            message = f"Container {raw.text(status, 'name')} of pod {name} cannot start ({reason}): {as_sentence(said)}"
            return PodProblem(ConditionReason.CANNOT_START, component, name, message)
        if _is_crash_looping(pod, status, now):
            return PodProblem(ConditionReason.CRASH_LOOPING, component, name, _crash(name, namespace, status))
    scheduled = raw.condition(pod, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        section = "workers" if component is Component.WORKER else "router"
        message = (
            f"No node takes pod {name}: {as_sentence(raw.text(scheduled, 'message'))} Add or free nodes, or change the "
            f"resources, nodeSelector, tolerations or affinity of spec.{section}."
        )
        return PodProblem(ConditionReason.UNSCHEDULABLE, component, name, message)
    return None


def as_sentence(message: str) -> str:
    """A message by another component as a sentence: on one line, of readable length, with a full stop."""
    text = " ".join(message.split()) or "no reason is given"
    text = text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _creation_refused(observed: Observed, component: Component) -> PodProblem | None:
    failure = raw.condition(observed.deployments.get(component), "ReplicaFailure")
    if failure.get("status") != "True":
        return None
    said = raw.text(failure, "message")
    over_quota = "exceeded quota" in said
    advice = "Ask for less, or have the namespace's quota raised." if over_quota else "Change what it objects to."
    return PodProblem(
        ConditionReason.QUOTA_EXCEEDED if over_quota else ConditionReason.CREATE_REFUSED,
        component,
        f"{observed.name}-{component}",
        f"Deployment {observed.name}-{component} may not create a pod: {as_sentence(said)} {advice}",
    )


def _with_earlier_cause(problem: PodProblem, earlier: Iterable[str]) -> PodProblem:
    """The problem with the cause that one of these earlier messages gave, if the kubelet gives none now."""
    if not problem.cause_missing:
        return problem
    head = f"{problem.message.removesuffix(f'. {_PULL_ADVICE}')}: "
    for message in earlier:
        start = message.find(head)
        end = message.find(_PULL_ADVICE, start)
        if start >= 0 and end >= 0:
            return replace(problem, message=message[start : end + len(_PULL_ADVICE)], cause_missing=False)
    return problem


def _pull_failure(pod: str, status: Raw, reason: str, said: str) -> tuple[str, bool]:
    """The message, and whether it lacks a cause."""
    if said.startswith(_BACK_OFF):
        # `Back-off pulling image "x"`, followed since 1.31 by `: ErrImagePull: the cause`.
        said = said.partition(": ")[2].removeprefix("ErrImagePull: ")
    cause = f": {as_sentence(said)}" if said else "." if reason == "ImagePullBackOff" else f" ({reason})."
    return f"Pod {pod} cannot pull image {raw.text(status, 'image')}{cause} {_PULL_ADVICE}", not said


def _is_crash_looping(pod: Raw, status: Raw, now: datetime) -> bool:
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
        code = f", exit code {over['exitCode']}" if type(over.get("exitCode")) is int else ""
        return f"{head}: it needs more memory than its limit (OOMKilled{code}). Raise its memory limit."
    termination_message = raw.text(over, "message")
    said = f" Its termination message: {as_sentence(termination_message)}" if termination_message else ""
    return f"{head}: last time with {_exit(over)}.{said} {logs}"


def _exit(over: Raw) -> str:
    """`exit code 3`, `exit code 137 (SIGKILL)`."""
    code = raw.number(over, "exitCode")
    number = raw.number(over, "signal") or (code - 128 if code > 128 else 0)
    if not number:
        return f"exit code {code}"
    try:
        return f"exit code {code} ({signal.Signals(number).name})"
    except ValueError:
        return f"exit code {code} (signal {number})"
