"""Role-based access control, decided by the Roles and bindings in the store.

Modelled: rules for resources, subresources and names; discovery for everybody; bindings to service accounts; that
nobody grants what they do not hold (`escalate`, `bind`). Checked against the real server by
`test_conformance_access.py`. Not modelled, and refused when they are written (`constraints.py`): users and groups as
subjects, aggregated roles, rules for paths. Access reviews are not served.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.kube.apiserver.errors import ApiError, resource_name
from tests.kube.apiserver.store import Object

if TYPE_CHECKING:
    from tests.kube.apiserver.cluster import Cluster, User
    from tests.kube.apiserver.resources import Resource

GROUP = "rbac.authorization.k8s.io"
DISCOVERY = {"api", "apis", "openapi", "version"}
"""Where paths begin that everybody may read who is somebody."""


@dataclass(frozen=True)
class Attributes:
    """What a request wants to do."""

    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    """Of a request for no resource."""

    @property
    def full(self) -> str:
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource


def _has(listed: Any, value: str) -> bool:
    return bool(listed) and ("*" in listed or value in listed)


def allows(rule: Object, wanted: Attributes) -> bool:
    """Whether one rule of a role allows a request."""
    if not _has(rule.get("verbs"), wanted.verb):
        return False
    if not _has(rule.get("apiGroups"), wanted.group):
        return False
    resources = rule.get("resources") or ()
    full = wanted.full
    if not (_has(resources, full) or (wanted.subresource and f"*/{wanted.subresource}" in resources)):
        return False
    names = rule.get("resourceNames")
    return not names or wanted.name in names


def _is_subject(subject: Object, user: User, namespace: str) -> bool:
    """Whether a binding is about a user: subjects are service accounts, others are refused when they are written."""
    where = subject.get("namespace") or namespace
    return user.name == f"system:serviceaccount:{where}:{subject.get('name')}"


def _rules_of(cluster: Cluster, reference: Object, namespace: str) -> list[Object]:
    kind = reference.get("kind")
    key = (GROUP, "clusterroles" if kind == "ClusterRole" else "roles")
    stored = cluster.store.get(key, ("" if kind == "ClusterRole" else namespace, reference.get("name", "")))
    return (stored.obj.get("rules") or []) if stored else []


def rules_for(cluster: Cluster, user: User, namespace: str) -> Iterator[Object]:
    """Every rule that holds for a user in a namespace (in all of them, for an empty one)."""
    for stored in cluster.store.all((GROUP, "clusterrolebindings")):
        if any(_is_subject(s, user, "") for s in stored.obj.get("subjects") or ()):
            yield from _rules_of(cluster, stored.obj["roleRef"], "")
    if namespace:
        for stored in cluster.store.all((GROUP, "rolebindings"), namespace):
            if any(_is_subject(s, user, namespace) for s in stored.obj.get("subjects") or ()):
                yield from _rules_of(cluster, stored.obj["roleRef"], namespace)


def authorized(cluster: Cluster, user: User, wanted: Attributes) -> bool:
    if wanted.path and wanted.verb == "get" and wanted.path.split("/")[1] in DISCOVERY:
        return True
    return user.admin or any(allows(rule, wanted) for rule in rules_for(cluster, user, wanted.namespace))


def forbidden(user: User, wanted: Attributes) -> ApiError:
    """403 as the real server words it."""
    if wanted.path:
        message = f'forbidden: User "{user.name}" cannot {wanted.verb} path "{wanted.path}"'
        return ApiError(403, message, "Forbidden", {})
    full = resource_name(wanted.group, wanted.resource)
    name = f' "{wanted.name}"' if wanted.name else ""
    scope = f'in the namespace "{wanted.namespace}"' if wanted.namespace else "at the cluster scope"
    message = (
        f'{full}{name} is forbidden: User "{user.name}" cannot {wanted.verb} resource "{wanted.full}" in API group '
        f'"{wanted.group}" {scope}'
    )
    details = {"name": wanted.name, "group": wanted.group, "kind": wanted.resource}
    return ApiError(403, message, "Forbidden", {k: v for k, v in details.items() if v})


def _missing(cluster: Cluster, user: User, namespace: str, rules: list[Object]) -> list[str]:
    """What the rules grant and a user does not hold."""
    held = list(rules_for(cluster, user, namespace))
    missing = []
    for rule in rules:
        names = rule.get("resourceNames") or [""]
        for verb, group, resource, name in itertools.product(
            rule["verbs"], rule["apiGroups"], rule["resources"], names
        ):
            plural, _, subresource = resource.partition("/")
            wanted = Attributes(verb, group, plural, subresource, "", name)
            if not any(allows(each, wanted) for each in held):
                missing.append(f"{verb} {resource_name(group, resource)} {name}".rstrip())
    return missing


def check_escalation(cluster: Cluster, resource: Resource, before: Object | None, obj: Object, user: User) -> None:
    """Raises `ApiError` 403 where a role, or a binding to one, grants what its writer does not hold."""
    if resource.group != GROUP or user.admin:
        return
    namespace = obj["metadata"].get("namespace", "")
    if resource.kind in ("Role", "ClusterRole"):
        if before is not None and before.get("rules") == obj.get("rules"):
            return
        verb, name, rules = "escalate", obj["metadata"]["name"], obj.get("rules") or []
        target = resource.plural
    else:
        if before is not None and (before.get("subjects"), before["roleRef"]) == (obj.get("subjects"), obj["roleRef"]):
            return
        reference = obj["roleRef"]
        verb, name, rules = "bind", reference["name"], _rules_of(cluster, reference, namespace)
        target = "clusterroles" if reference["kind"] == "ClusterRole" else "roles"
    if authorized(cluster, user, Attributes(verb, GROUP, target, "", namespace, name)):
        return
    if missing := _missing(cluster, user, namespace, rules):
        message = (
            f'{resource_name(resource.group, resource.plural)} "{obj["metadata"]["name"]}" is forbidden: user '
            f'"{user.name}" is attempting to grant RBAC permissions not currently held: {", ".join(missing)}'
        )
        details = {"name": obj["metadata"]["name"], "group": GROUP, "kind": resource.plural}
        raise ApiError(403, message, "Forbidden", details)
