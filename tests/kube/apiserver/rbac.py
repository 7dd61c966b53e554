"""Role-based access control, decided by the Roles and bindings in the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.kube.apiserver.errors import ApiError, resource_name
from tests.kube.apiserver.store import Object

if TYPE_CHECKING:
    from tests.kube.apiserver.cluster import Cluster, User
    from tests.kube.apiserver.resources import Resource

GROUP = "rbac.authorization.k8s.io"


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
    if wanted.path:
        return any(
            url == wanted.path or (url.endswith("*") and wanted.path.startswith(url[:-1]))
            for url in rule.get("nonResourceURLs") or ()
        )
    if not _has(rule.get("apiGroups"), wanted.group):
        return False
    resources = rule.get("resources") or ()
    full = wanted.full
    if not (_has(resources, full) or (wanted.subresource and f"*/{wanted.subresource}" in resources)):
        return False
    names = rule.get("resourceNames")
    return not names or wanted.name in names


def _is_subject(subject: Object, user: User, namespace: str) -> bool:
    match subject.get("kind"):
        case "User":
            return bool(subject.get("name") == user.name)
        case "Group":
            return subject.get("name") in user.groups
        case "ServiceAccount":
            where = subject.get("namespace") or namespace
            return user.name == f"system:serviceaccount:{where}:{subject.get('name')}"
    return False


def _rules_of(cluster: Cluster, reference: Object, namespace: str) -> list[Object]:
    kind = reference.get("kind")
    key = (GROUP, "clusterroles" if kind == "ClusterRole" else "roles")
    stored = cluster.store.get(key, ("" if kind == "ClusterRole" else namespace, reference.get("name", "")))
    return (stored.obj.get("rules") or []) if stored else []


_DISCOVERY: Object = {
    "verbs": ["get"],
    "nonResourceURLs": ["/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/readyz", "/openapi", "/openapi/*",
                        "/version", "/version/"],
}  # fmt: skip
_SELF: Object = {
    "verbs": ["create"], "apiGroups": ["authorization.k8s.io", "authentication.k8s.io"],
    "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"],
}  # fmt: skip


def rules_for(cluster: Cluster, user: User, namespace: str) -> Iterator[Object]:
    """Every rule that holds for a user in a namespace (in all of them, for an empty one)."""
    if user.admin:
        yield {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
        yield {"verbs": ["*"], "nonResourceURLs": ["*"]}
        return
    if "system:authenticated" in user.groups:
        yield _DISCOVERY
        yield _SELF
    for stored in cluster.store.all((GROUP, "clusterrolebindings")):
        if any(_is_subject(s, user, "") for s in stored.obj.get("subjects") or ()):
            yield from _rules_of(cluster, stored.obj["roleRef"], "")
    if namespace:
        for stored in cluster.store.all((GROUP, "rolebindings"), namespace):
            if any(_is_subject(s, user, namespace) for s in stored.obj.get("subjects") or ()):
                yield from _rules_of(cluster, stored.obj["roleRef"], namespace)


def authorized(cluster: Cluster, user: User, wanted: Attributes) -> bool:
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


def _covered(cluster: Cluster, user: User, namespace: str, rules: list[Object]) -> list[Object]:
    """The rules, taken apart, that a user does not hold."""
    held = list(rules_for(cluster, user, namespace))
    missing = []
    for rule in rules:
        for verb in rule.get("verbs") or ():
            for url in rule.get("nonResourceURLs") or ():
                if not any(allows(h, Attributes(verb, path=url)) for h in held):
                    missing.append({"verbs": [verb], "nonResourceURLs": [url]})
            for group in rule.get("apiGroups") or ():
                for resource in rule.get("resources") or ():
                    missing += [
                        part for part in _parts(rule, verb, group, resource) if not any(_holds(h, part) for h in held)
                    ]
    return missing


def _parts(rule: Object, verb: str, group: str, resource: str) -> Iterator[Object]:
    part: Object = {"apiGroups": [group], "resources": [resource], "verbs": [verb]}
    names = rule.get("resourceNames")
    if not names:
        yield part
    for name in names or ():
        yield {**part, "resourceNames": [name]}


def _holds(held: Object, part: Object) -> bool:
    plural, _, subresource = part["resources"][0].partition("/")
    names = part.get("resourceNames") or [""]
    wanted = Attributes(part["verbs"][0], part["apiGroups"][0], plural, subresource, "", names[0])
    return allows(held, wanted)


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
    missing = _covered(cluster, user, namespace, rules)
    if missing:
        listed = "\n".join(_shown(part) for part in missing)
        message = (
            f'{resource_name(resource.group, resource.plural)} "{obj["metadata"]["name"]}" is forbidden: '
            f'user "{user.name}" '
            f"(groups={_go_list(user.groups)}) is attempting to grant RBAC permissions not currently held:\n{listed}"
        )
        details = {"name": obj["metadata"]["name"], "group": GROUP, "kind": resource.plural}
        raise ApiError(403, message, "Forbidden", details)


def _go_list(values: tuple[str, ...] | list[str]) -> str:
    return "[" + " ".join(f'"{value}"' for value in values) + "]"


def _shown(part: Object) -> str:
    names = {"apiGroups": "APIGroups", "resources": "Resources", "resourceNames": "ResourceNames",
             "nonResourceURLs": "NonResourceURLs", "verbs": "Verbs"}  # fmt: skip
    return "{" + ", ".join(f"{word}:{_go_list(part[key])}" for key, word in names.items() if key in part) + "}"


def review(cluster: Cluster, resource: Resource, obj: Object, user: User, groups_of: Any) -> Object:
    """The answer to a SelfSubjectAccessReview and its kin."""
    spec = obj.get("spec") or {}
    if resource.kind == "SelfSubjectReview":
        return {**obj, "status": {"userInfo": {"username": user.name, "groups": list(user.groups)}}}
    if resource.kind == "SelfSubjectRulesReview":
        rules = list(rules_for(cluster, user, spec.get("namespace", "")))
        return {**obj, "status": {
            "incomplete": False,
            "resourceRules": [_trimmed(r, "nonResourceURLs") for r in rules if r.get("resources")],
            "nonResourceRules": [
                {name: r[name] for name in ("verbs", "nonResourceURLs")} for r in rules if r.get("nonResourceURLs")
            ],
        }}  # fmt: skip
    if resource.kind == "SubjectAccessReview":
        user = groups_of(spec.get("user", ""), tuple(spec.get("groups") or ()))
    asked = spec.get("resourceAttributes")
    if asked is not None:
        wanted = Attributes(
            asked.get("verb", ""), asked.get("group", ""), asked.get("resource", ""), asked.get("subresource", ""),
            asked.get("namespace", ""), asked.get("name", ""),
        )  # fmt: skip
    else:
        other = spec.get("nonResourceAttributes") or {}
        wanted = Attributes(other.get("verb", ""), path=other.get("path", "/"))
    allowed = authorized(cluster, user, wanted)
    return {**obj, "status": {"allowed": allowed, **({} if allowed else {"reason": ""})}}


def _trimmed(rule: Object, without: str) -> Object:
    return {key: value for key, value in rule.items() if key != without}
