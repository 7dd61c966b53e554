"""Discovery documents, aggregated and plain."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.kube.apiserver.resources import Registry, Resource

Object = dict[str, Any]

VERSION = {
    "major": "1", "minor": "35", "gitVersion": "v1.35.0", "gitCommit": "0000000000000000000000000000000000000000",
    "gitTreeState": "clean", "buildDate": "2025-12-17T00:00:00Z", "goVersion": "go1.25.5", "compiler": "gc",
    "platform": "linux/amd64",
}  # fmt: skip

_SUBRESOURCE_KINDS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "scale": ("autoscaling", "v1", "Scale", ("get", "patch", "update")),
    "eviction": ("policy", "v1", "Eviction", ("create",)),
    "token": ("authentication.k8s.io", "v1", "TokenRequest", ("create",)),
    "proxy": ("", "v1", "PodProxyOptions", ("create", "delete", "get", "patch", "update")),
    "log": ("", "v1", "Pod", ("get",)),
    "finalize": ("", "v1", "Namespace", ("update",)),
}


def _group_versions(registry: Registry) -> dict[str, dict[str, list[Resource]]]:
    found: dict[str, dict[str, list[Resource]]] = defaultdict(lambda: defaultdict(list))
    for resource in registry.all():
        found[resource.group][resource.version].append(resource)
    return found


def api_versions() -> Object:
    return {
        "kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": "127.0.0.1:6443"}],
    }  # fmt: skip


def _group(name: str, versions: list[str]) -> Object:
    listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def groups(registry: Registry) -> Object:
    found = [_group(name, list(versions)) for name, versions in _group_versions(registry).items() if name]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}


def group(registry: Registry, name: str) -> Object | None:
    versions = _group_versions(registry).get(name)
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, list(versions))} if versions else None


def resources(registry: Registry, group_name: str, version: str) -> Object | None:
    listed: list[Object] = []
    for resource in _group_versions(registry).get(group_name, {}).get(version, []):
        entry: Object = {
            "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
            "kind": resource.kind, "verbs": list(resource.verbs),
        }  # fmt: skip
        if resource.short_names:
            entry["shortNames"] = list(resource.short_names)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        listed.append(entry)
        for name in resource.subresources:
            sub_group, sub_version, kind, verbs = _subresource(resource, name)
            below: Object = {"name": f"{resource.plural}/{name}", "singularName": "", "namespaced": resource.namespaced,
                             "kind": kind, "verbs": list(verbs)}  # fmt: skip
            if (sub_group, sub_version) != (resource.group, resource.version):
                below["group"], below["version"] = sub_group, sub_version
            listed.append(below)
    if not listed:
        return None
    name = f"{group_name}/{version}" if group_name else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": listed}


def _subresource(resource: Resource, name: str) -> tuple[str, str, str, tuple[str, ...]]:
    if name == "status":
        return resource.group, resource.version, resource.kind, ("get", "patch", "update")
    return _SUBRESOURCE_KINDS[name]


def aggregated(registry: Registry, *, core: bool) -> Object:
    """Everything in one document, as `apidiscovery.k8s.io/v2`."""
    items = []
    for name, versions in _group_versions(registry).items():
        if (name == "") is not core:
            continue
        listed = [
            {"version": version, "freshness": "Current", "resources": [_aggregated(r) for r in found]}
            for version, found in versions.items()
        ]
        meta: Object = {"creationTimestamp": None}
        if name:
            meta["name"] = name
        items.append({"metadata": meta, "versions": listed})
    return {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}


def _aggregated(resource: Resource) -> Object:
    entry: Object = {
        "resource": resource.plural,
        "responseKind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.singular,
        "verbs": list(resource.verbs),
    }
    if resource.short_names:
        entry["shortNames"] = list(resource.short_names)
    if resource.categories:
        entry["categories"] = list(resource.categories)
    if resource.subresources:
        entry["subresources"] = []
        for name in resource.subresources:
            sub_group, sub_version, kind, verbs = _subresource(resource, name)
            entry["subresources"].append({
                "subresource": name, "responseKind": {"group": sub_group, "version": sub_version, "kind": kind},
                "verbs": list(verbs),
            })  # fmt: skip
    return entry
