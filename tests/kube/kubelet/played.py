"""Which fields of a pod the node plays, and which it may pass over. A pod with any other is refused, loudly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Spec = Mapping[str, Any]

POD = {
    *("containers", "initContainers", "volumes", "restartPolicy", "terminationGracePeriodSeconds", "nodeName"),
    *("serviceAccountName", "serviceAccount", "automountServiceAccountToken", "enableServiceLinks", "securityContext"),
}
PASSED_OVER = {
    # One node, which takes every pod; whose images need no secret; where names of Services do not resolve.
    *("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "schedulerName", "priorityClassName"),
    *("priority", "preemptionPolicy", "imagePullSecrets", "dnsPolicy", "overhead"),
}
POD_SECURITY = {"runAsUser", "runAsGroup", "runAsNonRoot", "fsGroup", "supplementalGroups", "seccompProfile"}
CONTAINER = {
    *("name", "image", "imagePullPolicy", "command", "args", "env", "envFrom", "ports", "volumeMounts", "lifecycle"),
    *("readinessProbe", "livenessProbe", "startupProbe", "securityContext", "restartPolicy"),
    # Passed over.
    *("resources", "terminationMessagePath", "terminationMessagePolicy"),
}
SECURITY = {
    *("allowPrivilegeEscalation", "readOnlyRootFilesystem", "runAsUser", "runAsGroup", "runAsNonRoot", "capabilities"),
    "seccompProfile",  # passed over
}
CAPABILITIES = {"drop"}
MOUNT = {"name", "mountPath", "readOnly"}
VOLUMES = {"emptyDir": {"medium", "sizeLimit"}, "configMap": {"name"}, "secret": {"secretName"}}


def unplayed(pod: Spec) -> list[str]:
    """Paths of the fields of this pod that the node does not know."""
    return sorted(_unplayed(pod["spec"]))


def _unplayed(spec: Spec) -> Iterator[str]:
    yield from _beyond("spec", spec, POD | PASSED_OVER)
    yield from _beyond("spec.securityContext", spec.get("securityContext"), POD_SECURITY)
    for kind in ("initContainers", "containers"):
        for each in spec.get(kind) or ():
            path = f"spec.{kind}[{each['name']}]"
            context = each.get("securityContext") or {}
            yield from _beyond(path, each, CONTAINER)
            yield from _beyond(f"{path}.lifecycle", each.get("lifecycle"), {"preStop"})
            yield from _beyond(f"{path}.securityContext", context, SECURITY)
            yield from _beyond(f"{path}.securityContext.capabilities", context.get("capabilities"), CAPABILITIES)
            for mount in each.get("volumeMounts") or ():
                yield from _beyond(f"{path}.volumeMounts[{mount['name']}]", mount, MOUNT)
    for volume in spec.get("volumes") or ():
        path = f"spec.volumes[{volume['name']}]"
        yield from _beyond(path, volume, {"name", *VOLUMES})
        for kind, fields in VOLUMES.items():
            yield from _beyond(f"{path}.{kind}", volume.get(kind), fields | {"defaultMode"})


def _beyond(path: str, given: Spec | None, known: set[str]) -> Iterator[str]:
    # What is null, false or empty asks for nothing.
    return (f"{path}.{name}" for name, value in (given or {}).items() if name not in known and value)
