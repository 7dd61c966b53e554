"""What the built-in kinds demand beyond their schemas: names, required fields, references, what may not change.

Modelled: rules that an object of the product could break (`pkg/apis/*/validation` in Kubernetes). Checked against the
real server by `test_conformance_objects.py` in part; the words are shorter than there. Not modelled: all other rules,
so that an object may be stored here that a real server refuses: what is new in an object needs a run against the real
server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.kube.apiserver.errors import Cause, unmodelled
from tests.kube.apiserver.selectors import selector_matches
from tests.kube.apiserver.validation import invalid, required, unsupported

Object = dict[str, Any]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?$")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
_QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
_FINALIZER = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9_.-]+$")

SUBDOMAIN_RULE = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
LABEL_RULE = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'"
SERVICE_RULE = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', and begin with a letter"
VALUE_RULE = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.'"
KEY_RULE = "name part must consist of alphanumeric characters, '-', '_' or '.'"
IMMUTABLE = "field is immutable"


def _name(kind: str, name: str) -> Iterator[Cause]:
    path = "metadata.name"
    if kind in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        return
    if kind == "Service":
        rule, longest, why = _SERVICE, 63, SERVICE_RULE
    elif kind == "Namespace":
        rule, longest, why = _LABEL, 63, LABEL_RULE
    else:
        rule, longest, why = _SUBDOMAIN, 253, SUBDOMAIN_RULE
    if len(name) > longest:
        yield invalid(path, name, f"must be no more than {longest} characters")
    if not rule.match(name):
        yield invalid(path, name, why)


def metadata(kind: str, obj: Object) -> Iterator[Cause]:
    """Faults of any object's metadata."""
    meta = obj["metadata"]
    yield from _name(kind, meta.get("name", ""))
    yield from _labels(meta.get("labels"), "metadata.labels")
    for key in meta.get("annotations") or {}:
        if not _QUALIFIED.match(key.lower()):
            yield invalid("metadata.annotations", key, KEY_RULE)
    size = sum(len(k) + len(v) for k, v in (meta.get("annotations") or {}).items() if isinstance(v, str))
    if size > 256 * 1024:
        yield Cause("metadata.annotations", "Too long: may not be more than 262144 bytes", "FieldValueTooLong")
    for reference in meta.get("ownerReferences") or ():
        for name in ("apiVersion", "kind", "name", "uid"):
            if not reference.get(name):
                yield required(f"metadata.ownerReferences.{name}", f"{name} must not be empty")
    if sum(bool(r.get("controller")) for r in meta.get("ownerReferences") or ()) > 1:
        yield Cause("metadata.ownerReferences", "Invalid value: Only one reference can have Controller set to true")
    for finalizer in meta.get("finalizers") or ():
        if not _FINALIZER.match(finalizer) and finalizer not in ("foregroundDeletion", "orphan", "kubernetes"):
            yield invalid(
                "metadata.finalizers", finalizer, "name is neither a standard finalizer name nor is it fully qualified"
            )


def _labels(labels: Any, path: str) -> Iterator[Cause]:
    for key, value in (labels or {}).items():
        if not _QUALIFIED.match(key):
            yield invalid(path, key, KEY_RULE)
        if len(value) > 63:
            yield invalid(path, value, "must be no more than 63 bytes")
        if not _VALUE.match(value):
            yield invalid(path, value, VALUE_RULE)


def _pod_template(spec: Object, path: str) -> Iterator[Cause]:
    containers = spec.get("containers") or []
    if not containers:
        yield required(f"{path}.containers")
    names: set[str] = set()
    volumes = {v.get("name") for v in spec.get("volumes") or ()}
    for kind in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(kind) or ()):
            where = f"{path}.{kind}[{number}]"
            name = container.get("name") or ""
            if not name:
                yield required(f"{where}.name")
            elif not _LABEL.match(name) or len(name) > 63:
                yield invalid(f"{where}.name", name, LABEL_RULE)
            if name in names:
                yield Cause(f"{where}.name", f'Duplicate value: "{name}"', "FieldValueDuplicate")
            names.add(name)
            if not container.get("image") and path.startswith("spec.template"):
                yield required(f"{where}.image")
            yield from _container(container, where, volumes)


def _container(container: Object, where: str, volumes: set[Any]) -> Iterator[Cause]:
    if container.get("imagePullPolicy") not in ("Always", "IfNotPresent", "Never"):
        yield unsupported(
            f"{where}.imagePullPolicy", container.get("imagePullPolicy"), ["Always", "IfNotPresent", "Never"]
        )
    for number, port in enumerate(container.get("ports") or ()):
        if not 0 < port.get("containerPort", 0) < 65536:
            yield invalid(
                f"{where}.ports[{number}].containerPort",
                port.get("containerPort", 0),
                "must be between 1 and 65535, inclusive",
            )
        if len(port.get("name") or "") > 15:
            yield invalid(f"{where}.ports[{number}].name", port["name"], "must be no more than 15 characters")
    for number, mount in enumerate(container.get("volumeMounts") or ()):
        if mount.get("name") not in volumes:
            yield Cause(
                f"{where}.volumeMounts[{number}].name", f'Not found: "{mount.get("name")}"', "FieldValueNotFound"
            )


def _workload(obj: Object) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    replicas = spec.get("replicas")
    if isinstance(replicas, int) and replicas < 0:
        yield invalid("spec.replicas", replicas, "must be greater than or equal to 0")
    selector = spec.get("selector")
    if selector is None:
        yield required("spec.selector")
    elif not selector.get("matchLabels") and not selector.get("matchExpressions"):
        yield invalid("spec.selector", selector, "empty selector is invalid for deployment")
    template = spec.get("template") or {}
    labels = (template.get("metadata") or {}).get("labels") or {}
    if selector and not selector_matches(selector, labels):
        yield invalid("spec.template.metadata.labels", labels, "`selector` does not match template `labels`")
    yield from _labels(labels, "spec.template.labels")
    yield from _pod_template(template.get("spec") or {}, "spec.template.spec")
    strategy = spec.get("strategy") or {}
    rolling = strategy.get("rollingUpdate") or {}
    if rolling.get("maxSurge") in (0, "0%") and rolling.get("maxUnavailable") in (0, "0%"):
        yield invalid(
            "spec.strategy.rollingUpdate.maxUnavailable", rolling["maxUnavailable"], "may not be 0 when `maxSurge` is 0"
        )


def _service(obj: Object) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    ports = spec.get("ports") or []
    if not ports and spec.get("clusterIP") != "None":
        yield required("spec.ports")
    seen: set[Any] = set()
    for number, port in enumerate(ports):
        where = f"spec.ports[{number}]"
        if len(ports) > 1 and not port.get("name"):
            yield required(f"{where}.name")
        if port.get("name") and port["name"] in seen:
            yield Cause(f"{where}.name", f'Duplicate value: "{port["name"]}"', "FieldValueDuplicate")
        seen.add(port.get("name"))
        if not 0 < port.get("port", 0) < 65536:
            yield invalid(f"{where}.port", port.get("port", 0), "must be between 1 and 65535, inclusive")
    if spec.get("type") == "ExternalName":
        yield unmodelled("spec.type", "Services of the type ExternalName")
    elif spec.get("type") not in ("ClusterIP", "NodePort", "LoadBalancer"):
        yield unsupported("spec.type", spec.get("type"), ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"])


def _budget(obj: Object) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    if spec.get("minAvailable") is not None and spec.get("maxUnavailable") is not None:
        yield invalid("spec", spec, "minAvailable and maxUnavailable cannot be both set")


def _autoscaler(obj: Object) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    least, most = spec.get("minReplicas", 1), spec.get("maxReplicas", 0)
    if most < 1:
        yield invalid("spec.maxReplicas", most, "must be greater than 0")
    if most < least:
        yield invalid("spec.maxReplicas", most, "must be greater than or equal to `minReplicas`")
    if least < 1:
        yield invalid("spec.minReplicas", least, "must be greater than or equal to 1")


def _slice(obj: Object) -> Iterator[Cause]:
    if obj.get("addressType") not in ("IPv4", "IPv6", "FQDN"):
        yield required("addressType") if not obj.get("addressType") else unsupported(
            "addressType", obj["addressType"], ["IPv4", "IPv6", "FQDN"])  # fmt: skip
    for number, endpoint in enumerate(obj.get("endpoints") or ()):
        if not endpoint.get("addresses"):
            yield required(f"endpoints[{number}].addresses", "must contain at least 1 address")


def faults(kind: str, obj: Object) -> Iterator[Cause]:
    """Faults of a built-in object that its schema does not find."""
    match kind:
        case "Deployment" | "ReplicaSet":
            yield from _workload(obj)
        case "Pod":
            yield from _pod_template(obj.get("spec") or {}, "spec")
        case "Service":
            yield from _service(obj)
        case "PodDisruptionBudget":
            yield from _budget(obj)
        case "HorizontalPodAutoscaler":
            yield from _autoscaler(obj)
        case "EndpointSlice":
            yield from _slice(obj)
        case "Event":
            place = (obj.get("involvedObject") or {}).get("namespace") or "default"
            if place != obj["metadata"].get("namespace"):
                yield invalid("involvedObject.namespace", place, "does not match event.namespace")
        case "Role" | "ClusterRole":
            if obj.get("aggregationRule") or any(rule.get("nonResourceURLs") for rule in obj.get("rules") or ()):
                yield unmodelled("rules", "aggregated roles, and roles for paths")
        case "RoleBinding" | "ClusterRoleBinding":
            if any(subject.get("kind") != "ServiceAccount" for subject in obj.get("subjects") or ()):
                yield unmodelled("subjects", "users and groups as subjects")
        case "ConfigMap":
            if sum(map(len, (obj.get("data") or {}).values())) > 1 << 20:
                yield Cause("[]", "Too long: may not be more than 1048576 bytes", "FieldValueTooLong")
            for key, value in (obj.get("data") or {}).items():
                if not re.fullmatch(r"[-._a-zA-Z0-9]+", key):
                    yield invalid(f"data[{key}]", key, "a valid config key must consist of alphanumeric characters")
                if not isinstance(value, str):
                    yield Cause(f"data.{key}", "Invalid value: must be a string", "FieldValueTypeInvalid")


def _same(old: Object, new: Object, *path: str) -> tuple[bool, Any]:
    before: Any = old
    after: Any = new
    for name in path:
        before, after = (before or {}).get(name), (after or {}).get(name)
    return before == after, after


_IMMUTABLE: dict[str, list[tuple[str, ...]]] = {
    "Deployment": [("spec", "selector")],
    "ReplicaSet": [("spec", "selector")],
    "EndpointSlice": [("addressType",)],
}


def changes(kind: str, old: Object, new: Object) -> Iterator[Cause]:
    """Faults of the change from one built-in object to another."""
    for path in _IMMUTABLE.get(kind, ()):
        same, value = _same(old, new, *path)
        if not same:
            yield invalid(".".join(path), value, IMMUTABLE)
    if kind in ("RoleBinding", "ClusterRoleBinding") and old.get("roleRef") != new.get("roleRef"):
        yield invalid("roleRef", new.get("roleRef"), "cannot change roleRef")
    if kind == "Service":
        before, after = (old.get("spec") or {}).get("clusterIP"), (new.get("spec") or {}).get("clusterIP")
        if before and before != after:
            yield Cause("spec.clusterIPs[0]", f'Invalid value: ["{after or ""}"]: may not change once set')
    if kind in ("ConfigMap", "Secret") and old.get("immutable"):
        yield unmodelled("immutable", "changes of immutable objects")
    if kind == "Pod":
        yield from _pod_change(old.get("spec") or {}, new.get("spec") or {})


def _pod_change(old: Object, new: Object) -> Iterator[Cause]:
    free = {
        "activeDeadlineSeconds",
        "terminationGracePeriodSeconds",
        "tolerations",
        "nodeName",
        "containers",
        "initContainers",
    }
    images = [[{**c, "image": "", "imagePullPolicy": ""} for c in spec.get("containers") or ()] for spec in (old, new)]
    rest = [{k: v for k, v in spec.items() if k not in free} for spec in (old, new)]
    if images[0] != images[1] or rest[0] != rest[1] or (old.get("nodeName") and old["nodeName"] != new.get("nodeName")):
        why = "pod updates may not change fields other than `spec.containers[*].image` and a few others"
        yield Cause("spec", f"Forbidden: {why}", "FieldValueForbidden")


def status_faults(kind: str, obj: Object) -> Iterator[Cause]:
    """Faults of a status that contradicts itself."""
    if kind not in ("Deployment", "ReplicaSet"):
        return
    status = obj.get("status") or {}
    for name, most in (
        ("updatedReplicas", "replicas"), ("readyReplicas", "replicas"), ("availableReplicas", "replicas"),
        ("fullyLabeledReplicas", "replicas"), ("availableReplicas", "readyReplicas"),
    ):  # fmt: skip
        if (status.get(name) or 0) > (status.get(most) or 0):
            words = f"cannot be greater than {'status.' if most == 'replicas' else ''}{most}"
            yield invalid(f"status.{name}", status[name], words)
