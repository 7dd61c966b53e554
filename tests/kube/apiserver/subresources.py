"""Subresources of a kind of their own: scale, eviction, proxy, log, token."""

from __future__ import annotations

from typing import Any

import httpx
import orjson

from tests.kube.apiserver import deletion, handlers, writes
from tests.kube.apiserver.cluster import Cluster
from tests.kube.apiserver.errors import ApiError, bad_request, conflict, method_not_allowed, no_such_path
from tests.kube.apiserver.jsonpath import first
from tests.kube.apiserver.patches import merge_patch
from tests.kube.apiserver.request import Call, token_of
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.selectors import selector_matches
from tests.kube.apiserver.store import Object, Stored

Answer = handlers.Answer


def _selector_text(selector: Any) -> str:
    """A selector as the scale subresource shows it."""
    if isinstance(selector, str) or not selector:
        return selector or ""
    parts = [f"{key}={value}" for key, value in sorted((selector.get("matchLabels") or selector).items())]
    for term in (
        selector.get("matchExpressions") or () if "matchLabels" in selector or "matchExpressions" in selector else ()
    ):
        values = ",".join(term.get("values") or ())
        match term["operator"]:
            case "In" | "NotIn":
                parts.append(f"{term['key']} {term['operator'].lower()} ({values})")
            case "Exists":
                parts.append(term["key"])
            case _:
                parts.append(f"!{term['key']}")
    return ",".join(parts)


def scale_of(resource: Resource, obj: Object) -> Object:
    """An object's `autoscaling/v1` Scale."""
    paths = resource.scale
    assert paths is not None
    meta = {
        k: obj["metadata"][k]
        for k in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        if k in obj["metadata"]
    }
    status: Object = {"replicas": first(obj, paths.status_path) or 0}
    selector = first(obj, paths.selector_path) if resource.custom and paths.selector_path else None
    if not resource.custom:
        selector = (obj.get("spec") or {}).get("selector")
    if text := _selector_text(selector):
        status["selector"] = text
    wanted = first(obj, paths.spec_path)
    spec: Object = {} if not wanted else {"replicas": wanted}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta, "spec": spec, "status": status}


def scale(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    stored = handlers.found(cluster, resource, call)
    if resource.scale is None:
        raise no_such_path()
    current = scale_of(resource, stored.obj)
    if call.method == "GET":
        return 200, orjson.dumps(current)
    if call.method not in ("PUT", "PATCH"):
        raise method_not_allowed()
    wanted = call.body()
    if call.method == "PATCH":
        kind = call.headers.get("content-type", "").partition(";")[0].strip()
        if kind == handlers.APPLY or "strategic" in kind:
            wanted = merge_patch(current, wanted)
        else:
            wanted = handlers.patched(resource, current, kind, wanted)
    return 200, orjson.dumps(scale_of(resource, _rescale(cluster, resource, stored, wanted, call)))


def _rescale(cluster: Cluster, resource: Resource, stored: Stored, wanted: Any, call: Call) -> Object:
    if not isinstance(wanted, dict) or wanted.get("kind", "Scale") != "Scale":
        raise bad_request("the object provided is not a Scale")
    version = (wanted.get("metadata") or {}).get("resourceVersion")
    if version and version != stored.obj["metadata"]["resourceVersion"]:
        raise conflict(resource.group, resource.plural, call.name)
    replicas = (wanted.get("spec") or {}).get("replicas", 0)
    if not isinstance(replicas, int) or replicas < 0:
        raise ApiError(
            422, f'Scale.autoscaling "{call.name}" is invalid: spec.replicas: Invalid value: {replicas}: must be '
            "greater than or equal to 0", "Invalid",
            {"name": call.name, "group": "autoscaling", "kind": "Scale", "causes": [
                {"reason": "FieldValueInvalid", "field": "spec.replicas",
                 "message": f"Invalid value: {replicas}: must be greater than or equal to 0"}]},
        )  # fmt: skip
    obj = stored.copy()
    *parents, last = resource.scale.spec_path.strip(".").split(".")  # type: ignore[union-attr]
    level = obj
    for name in parents:
        level = level.setdefault(name, {})
    level[last] = replicas
    return writes.update(cluster, resource, stored, obj, call.ask(), patch=True)


def evict(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    """Delete a pod unless a budget forbids it."""
    stored = handlers.found(cluster, resource, call)
    body = call.body() or {}
    labels = stored.obj["metadata"].get("labels") or {}
    ready = _is_ready(stored.obj)
    for budget in cluster.store.all(("policy", "poddisruptionbudgets"), call.namespace):
        if not selector_matches(budget.obj["spec"].get("selector"), labels) or not ready:
            continue
        status = budget.obj.get("status") or {}
        if status.get("disruptionsAllowed", 0) < 1:
            name = budget.obj["metadata"]["name"]
            why = f"The disruption budget {name} needs {status.get('desiredHealthy', 0)} healthy pods and has " \
                  f"{status.get('currentHealthy', 0)} currently"  # fmt: skip
            raise ApiError(
                429, "Cannot evict pod as it would violate the pod's disruption budget.", "TooManyRequests",
                {"causes": [{"reason": "DisruptionBudget", "message": why}]},
            )  # fmt: skip
        changed = budget.copy()
        changed["status"]["disruptionsAllowed"] -= 1
        cluster.store.put(("policy", "poddisruptionbudgets"), (call.namespace, changed["metadata"]["name"]), changed)
    how = deletion.options({**(body.get("deleteOptions") or {}), "kind": "DeleteOptions"}, call.query)
    deletion.delete(cluster, resource, stored, how)
    return 201, orjson.dumps({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def token(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    stored = handlers.found(cluster, resource, call)
    meta = stored.obj["metadata"]
    value = token_of(f"system:serviceaccount:{meta['namespace']}:{meta['name']}")
    status = {"token": value, "expirationTimestamp": "2099-01-01T00:00:00Z"}
    body = call.body() or {}
    return 201, orjson.dumps(
        {**body, "kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "status": status}
    )


async def proxy(cluster: Cluster, resource: Resource, call: Call, client: httpx.AsyncClient) -> tuple[int, bytes, str]:
    """Pass a request on to a pod: `pods/<name>:<port>/proxy/<path>`. Returns status, body and content type."""
    full = call.name
    parts = full.split(":")
    scheme, name, port = ("http", parts[0], parts[1]) if len(parts) == 2 else \
        (parts[0], parts[1], parts[2]) if len(parts) == 3 else ("http", parts[0], "")  # fmt: skip
    call.name = name
    try:
        stored = handlers.found(cluster, resource, call)
    finally:
        call.name = full
    address = (stored.obj.get("status") or {}).get("podIP")
    if not address:
        raise bad_request(f"address not allowed: pod {name} has no IP")
    url = f"{scheme}://{address}:{_port(stored.obj, port)}/{call.tail}"
    headers = {k: v for k, v in call.headers.items() if k in ("accept", "content-type")}
    try:
        answer = await client.request(call.method, url, params=call.query, content=call.raw or None, headers=headers)
    except httpx.HTTPError as error:
        raise ApiError(503, f"error trying to reach service: {error}", "ServiceUnavailable") from None
    return answer.status_code, answer.content, answer.headers.get("content-type", "application/octet-stream")


def _port(pod: Object, wanted: str) -> int:
    ports = [p for c in pod["spec"].get("containers") or () for p in c.get("ports") or ()]
    if wanted.isdigit():
        return int(wanted)
    if not wanted:
        return int(ports[0]["containerPort"]) if ports else 80
    for port in ports:
        if port.get("name") == wanted:
            return int(port["containerPort"])
    raise ApiError(503, f'no port named "{wanted}"', "ServiceUnavailable")
