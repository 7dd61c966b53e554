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


Object = dict[str, Any]
META = "io.k8s.apimachinery.pkg.apis.meta.v1."
PROTOBUF = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
_QUERY = ("dryRun", "fieldManager", "fieldValidation", "force", "pretty")


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


def openapi(registry: Registry, parts: list[str], accept: str) -> tuple[str, Object | bytes] | None:
    """Content type and content of the document at /openapi/<parts>.

    Version 2 as protobuf is an empty document: kubectl asks for it only about kinds that version 3 does not know.
    """
    if parts == ["v2"] and "protobuf" in accept and "json" not in accept:
        return PROTOBUF, b""
    found = _json(registry, parts)
    return ("application/json", found) if found is not None else None


def _json(registry: Registry, parts: list[str]) -> Object | None:
    match parts:
        case ["v2"]:
            return _v2(registry)
        case ["v3"]:
            return _index(registry)
        case ["v3", "api", version]:
            return _v3(registry, "", version)
        case ["v3", "apis", group, version]:
            return _v3(registry, group, version)
    return None


def _index(registry: Registry) -> Object:
    paths = {}
    for resource in registry.all():
        where = f"apis/{resource.group}/{resource.version}" if resource.group else f"api/{resource.version}"
        paths[where] = {"serverRelativeURL": f"/openapi/v3/{where}"}
    return {"paths": paths}


def _references(value: Any, found: set[str]) -> None:
    if isinstance(value, dict):
        reference = value.get("$ref")
        if isinstance(reference, str):
            found.add(reference.rpartition("/")[2])
        for below in value.values():
            _references(below, found)
    elif isinstance(value, list):
        for below in value:
            _references(below, found)


def _published(value: Any, prefix: str) -> Any:
    """A definition as OpenAPI publishes it: one type each, references below `prefix`."""
    if isinstance(value, list):
        return [_published(item, prefix) for item in value]
    if not isinstance(value, dict):
        return value
    shown = {}
    for name, below in value.items():
        if name == "$ref" and isinstance(below, str):
            shown[name] = prefix + below.rpartition("/")[2]
        elif name == "type" and isinstance(below, list):
            shown[name] = next(kind for kind in below if kind != "null")
        else:
            shown[name] = _published(below, prefix)
    return shown


def _definitions(registry: Registry, resources: list[Resource], prefix: str) -> Object:
    """Every definition these resources need."""
    raw = registry.definitions.raw
    found: Object = {}
    wanted: set[str] = {META + "ObjectMeta", META + "ListMeta", META + "Status", META + "DeleteOptions"}
    for resource in resources:
        if not resource.custom:
            wanted.add(resource.definition)
            continue
        schema = {**resource.openapi, "type": "object"}
        properties = dict(schema.get("properties") or {})
        for name, what in (("apiVersion", "APIVersion"), ("kind", "Kind")):
            properties[name] = {"type": "string", "description": f"{what} of the object."}
        properties["metadata"] = {"allOf": [{"$ref": prefix + META + "ObjectMeta"}],
                                  "description": "Standard object's metadata.", "default": {}}  # fmt: skip
        if "v2" in prefix or prefix == "#/definitions/":
            properties["metadata"] = {"$ref": prefix + META + "ObjectMeta"}
        schema["properties"] = properties
        schema["x-kubernetes-group-version-kind"] = [_gvk(resource)]
        found[resource.definition] = schema
    while wanted:
        name = wanted.pop()
        if name in found or name not in raw:
            continue
        found[name] = _published(raw[name], prefix)
        _references(raw[name], wanted)
    return found


def _gvk(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _paths(resources: list[Resource], *, v3: bool) -> Object:
    parameters: list[Object] = []
    for name in _QUERY:
        parameter: Object = {"name": name, "in": "query", "uniqueItems": True}
        kind = "boolean" if name == "force" else "string"
        parameter |= {"schema": {"type": kind, "uniqueItems": True}} if v3 else {"type": kind}
        parameters.append(parameter)
    paths: Object = {}
    for resource in resources:
        root = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
        where = f"{root}/namespaces/{{namespace}}" if resource.namespaced else root
        gvk = {"x-kubernetes-group-version-kind": _gvk(resource)}
        answers = {"responses": {"200": {"description": "OK"}}}
        paths[f"{where}/{resource.plural}"] = {
            "get": {"x-kubernetes-action": "list", **gvk, **answers},
            "post": {"parameters": parameters, "x-kubernetes-action": "post", **gvk, **answers},
        }
        paths[f"{where}/{resource.plural}/{{name}}"] = {
            "get": {"x-kubernetes-action": "get", **gvk, **answers},
            "put": {"parameters": parameters, "x-kubernetes-action": "put", **gvk, **answers},
            "patch": {"parameters": parameters, "x-kubernetes-action": "patch", **gvk, **answers},
        }
    return paths


def _v3(registry: Registry, group: str, version: str) -> Object | None:
    resources = [r for r in registry.all() if (r.group, r.version) == (group, version)]
    if not resources:
        return None
    return {
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.35.0"},
        "paths": _paths(resources, v3=True),
        "components": {"schemas": _definitions(registry, resources, "#/components/schemas/")},
    }  # fmt: skip


def _v2(registry: Registry) -> Object:
    resources = registry.all()
    return {
        "swagger": "2.0", "info": {"title": "Kubernetes", "version": "v1.35.0"},
        "paths": _paths(resources, v3=False), "definitions": _definitions(registry, resources, "#/definitions/"),
    }  # fmt: skip
