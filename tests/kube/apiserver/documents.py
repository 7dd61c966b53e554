"""What clients read about the API: discovery and OpenAPI.

Modelled: discovery group by group, as kubectl and helm fall back to and kopf and the controller read it; OpenAPI 3 as
far as kubectl (validation, `explain`) and helm read it. Checked against the real server by `test_conformance.py`, and
by kubectl and helm themselves.

Not modelled: aggregated discovery (the answer is the plain document, as of servers before Kubernetes 1.26); OpenAPI 2,
which is empty in protobuf (kubectl asks for it about kinds that version 3 does not know) and refused as JSON.
"""

from __future__ import annotations

from typing import Any

from tests.kube.apiserver.errors import not_modelled
from tests.kube.apiserver.resources import Registry, Resource

Object = dict[str, Any]

VERSION = {
    "major": "1", "minor": "35", "gitVersion": "v1.35.0", "gitCommit": "0000000000000000000000000000000000000000",
    "gitTreeState": "clean", "buildDate": "2025-12-17T00:00:00Z", "goVersion": "go1.25.5", "compiler": "gc",
    "platform": "linux/amd64",
}  # fmt: skip
META = "io.k8s.apimachinery.pkg.apis.meta.v1."
SCHEMAS = "#/components/schemas/"
PROTOBUF = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
_QUERY = ("dryRun", "fieldManager", "fieldValidation", "force", "pretty")

API_VERSIONS = {
    "kind": "APIVersions", "versions": ["v1"],
    "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": "127.0.0.1:6443"}],
}  # fmt: skip


def groups(registry: Registry) -> Object:
    """At /apis. Every group has one version."""
    listed = []
    for name, version in dict.fromkeys((r.group, r.version) for r in registry.all() if r.group):
        served = {"groupVersion": f"{name}/{version}", "version": version}
        listed.append({"name": name, "versions": [served], "preferredVersion": served})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}


def resources(registry: Registry, group: str, version: str) -> Object | None:
    """At /api/<version> or /apis/<group>/<version>; None where nothing is served there."""
    listed: list[Object] = []
    for resource in registry.of(group, version):
        entry: Object = {
            "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
            "kind": resource.kind, "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
        }  # fmt: skip
        if resource.short_names:
            entry["shortNames"] = list(resource.short_names)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        listed.append(entry)
        listed += [_subresource(resource, name) for name in resource.subresources]
    name = f"{group}/{version}" if group else version
    head = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name}
    return {**head, "resources": listed} if listed else None


def _subresource(resource: Resource, name: str) -> Object:
    entry: Object = {"name": f"{resource.plural}/{name}", "singularName": "", "namespaced": resource.namespaced}
    match name:
        case "scale":
            about = {"group": "autoscaling", "version": "v1", "kind": "Scale"}
            return {**entry, **about, "verbs": ["get", "patch", "update"]}
        case "proxy":
            return {**entry, "kind": "PodProxyOptions", "verbs": ["get"]}
    return {**entry, "kind": resource.kind, "verbs": ["get", "patch", "update"]}


def openapi(registry: Registry, parts: list[str], accept: str) -> tuple[str, Object | bytes] | None:
    """Content type and content of the document at /openapi/<parts>."""
    match parts:
        case ["v2"]:
            if "protobuf" not in accept or "json" in accept:
                raise not_modelled("OpenAPI 2 as JSON")
            return PROTOBUF, b""
        case ["v3"]:
            return "application/json", _index(registry)
        case ["v3", "api", version]:
            group = ""
        case ["v3", "apis", group, version]:
            pass
        case _:
            return None
    found = _v3(registry.of(group, version), registry)
    return ("application/json", found) if found is not None else None


def _index(registry: Registry) -> Object:
    paths = {}
    for resource in registry.all():
        where = f"apis/{resource.group}/{resource.version}" if resource.group else f"api/{resource.version}"
        paths[where] = {"serverRelativeURL": f"/openapi/v3/{where}"}
    return {"paths": paths}


def _v3(served: list[Resource], registry: Registry) -> Object | None:
    if not served:
        return None
    return {
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": VERSION["gitVersion"]},
        "paths": _paths(served), "components": {"schemas": _schemas(served, registry.definitions.raw)},
    }  # fmt: skip


def _paths(served: list[Resource]) -> Object:
    parameters: list[Object] = []
    for name in _QUERY:
        schema = {"type": "boolean" if name == "force" else "string", "uniqueItems": True}
        parameters.append({"name": name, "in": "query", "uniqueItems": True, "schema": schema})
    paths: Object = {}
    for resource in served:
        root = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
        where = f"{root}/namespaces/{{namespace}}" if resource.namespaced else root
        about = {"x-kubernetes-group-version-kind": _gvk(resource), "responses": {"200": {"description": "OK"}}}
        paths[f"{where}/{resource.plural}"] = {
            "get": {"x-kubernetes-action": "list", **about},
            "post": {"parameters": parameters, "x-kubernetes-action": "post", **about},
        }
        paths[f"{where}/{resource.plural}/{{name}}"] = {
            "get": {"x-kubernetes-action": "get", **about},
            "put": {"parameters": parameters, "x-kubernetes-action": "put", **about},
            "patch": {"parameters": parameters, "x-kubernetes-action": "patch", **about},
        }
    return paths


def _gvk(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _schemas(served: list[Resource], raw: Object) -> Object:
    """Every definition these resources need."""
    found: Object = {}
    wanted: set[str] = {META + "ObjectMeta", META + "ListMeta", META + "Status", META + "DeleteOptions"}
    for resource in served:
        if resource.custom:
            found[resource.definition] = _custom(resource)
        else:
            wanted.add(resource.definition)
    while wanted:
        name = wanted.pop()
        if name not in found and name in raw:
            found[name] = _published(raw[name])
            _references(raw[name], wanted)
    return found


def _custom(resource: Resource) -> Object:
    properties = dict(resource.openapi.get("properties") or {})
    for name, what in (("apiVersion", "APIVersion"), ("kind", "Kind")):
        properties[name] = {"type": "string", "description": f"{what} of the object."}
    properties["metadata"] = {"allOf": [{"$ref": f"{SCHEMAS}{META}ObjectMeta"}],
                              "description": "Standard object's metadata.", "default": {}}  # fmt: skip
    about = {"properties": properties, "x-kubernetes-group-version-kind": [_gvk(resource)]}
    return {**resource.openapi, "type": "object", **about}


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


def _published(value: Any) -> Any:
    """A definition as OpenAPI publishes it: one type each, references to the document's schemas."""
    if isinstance(value, list):
        return [_published(item) for item in value]
    if not isinstance(value, dict):
        return value
    shown = {}
    for name, below in value.items():
        if name == "$ref" and isinstance(below, str):
            shown[name] = SCHEMAS + below.rpartition("/")[2]
        elif name == "type" and isinstance(below, list):
            shown[name] = next(kind for kind in below if kind != "null")
        else:
            shown[name] = _published(below)
    return shown
