"""Facts about pods, read from their status: readiness, phase, containers, a short description of their state."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from controller.api.model import MANAGEMENT_VOLUME
from controller.objects.names import COMPONENT_LABEL, Component
from controller.status import raw
from controller.status.raw import Raw


def component_of(pod: Raw) -> str:
    """The pod's component; empty for a pod that is not ours."""
    return raw.text(pod, "metadata", "labels", COMPONENT_LABEL)


def active(pods: Iterable[Raw], component: Component) -> list[Raw]:
    """The pods of a component that have not ended and are not being deleted, sorted by name."""
    found = [
        pod
        for pod in pods
        if component_of(pod) == component
        and not raw.is_terminating(pod)
        and raw.text(pod, "status", "phase") not in ("Failed", "Succeeded")
    ]
    return sorted(found, key=raw.name)


def is_ready(pod: Raw) -> bool:
    """Whether a Service sends requests to the pod."""
    return _passes_its_probe(pod) and not raw.is_terminating(pod)


def _passes_its_probe(pod: Raw) -> bool:
    return raw.condition(pod, "Ready").get("status") == "True"


def management_secret(pod: Raw) -> str:
    """Name of the Secret with the tokens that this router's management port asks for; empty where it asks for none."""
    volumes = raw.objects(pod, "spec", "volumes")
    return next(
        (raw.text(each, "secret", "secretName") for each in volumes if each.get("name") == MANAGEMENT_VOLUME), ""
    )


def is_running(pod: Raw) -> bool:
    """Whether the pod is in the phase Running: at least one container runs or restarts."""
    return raw.text(pod, "status", "phase") == "Running"


def still_serving(pods: Iterable[Raw], component: Component) -> int:
    """How many pods of a component are terminating and ready. A Service sends requests to them while it has no other
    endpoint (KEP-1669)."""
    return sum(component_of(pod) == component and raw.is_terminating(pod) and _passes_its_probe(pod) for pod in pods)


def ready_for(pod: Raw, now: datetime) -> timedelta | None:
    """How long the pod has been ready; None when it is not."""
    if not is_ready(pod):
        return None
    since = raw.when(raw.condition(pod, "Ready").get("lastTransitionTime"))
    return timedelta.max if since is None else now - since


def containers(pod: Raw) -> list[Raw]:
    """The status of each container, init containers first."""
    return [*raw.objects(pod, "status", "initContainerStatuses"), *raw.objects(pod, "status", "containerStatuses")]


def state_of(pod: Raw) -> str:
    """The pod's state in a few words: `terminating`, `ready`, a container's reason for waiting, or the phase."""
    if raw.is_terminating(pod):
        return "terminating"
    if is_ready(pod):
        return "ready"
    for status in containers(pod):
        for path in (("state", "waiting", "reason"), ("state", "terminated", "reason")):
            reason = raw.text(status, *path)
            # An init container that has completed is no reason for not being ready.
            if reason and reason != "Completed":
                return reason
    phase = raw.text(pod, "status", "phase")
    return "runs, not ready" if phase == "Running" else phase or "Pending"
