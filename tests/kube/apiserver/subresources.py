"""Subresources of a kind of their own: scale, and the proxy of pods.

Modelled: scales of custom resources and (without their selectors) of Deployments; GET through a pod's proxy by port
number, as `kubectl kvcluster` asks, streams included. Checked against the real server by `test_conformance.py` (scale).
Not modelled, and refused with 501: evictions, logs, tokens, attaching and forwarding of ports.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson

from tests.kube.apiserver import handlers, writes
from tests.kube.apiserver.cluster import Cluster
from tests.kube.apiserver.errors import ApiError, bad_request, conflict, not_modelled
from tests.kube.apiserver.patches import merge_patch
from tests.kube.apiserver.request import Call
from tests.kube.apiserver.resources import Resource
from tests.kube.apiserver.store import Object, Stored
from tests.kube.apiserver.tables import first

Answer = handlers.Answer


def scale_of(resource: Resource, obj: Object) -> Object:
    """An object's `autoscaling/v1` Scale."""
    paths = resource.scale
    assert paths is not None
    meta = {k: obj["metadata"][k] for k in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    status: Object = {"replicas": first(obj, paths.status_path) or 0}
    if paths.selector_path and (selector := first(obj, paths.selector_path)):
        status["selector"] = selector
    wanted = first(obj, paths.spec_path)
    spec: Object = {} if not wanted else {"replicas": wanted}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta, "spec": spec, "status": status}


def scale(cluster: Cluster, resource: Resource, call: Call) -> Answer:
    stored = handlers.found(cluster, resource, call)
    current = scale_of(resource, stored.obj)
    if call.method == "GET":
        return 200, orjson.dumps(current)
    wanted = call.body()
    if call.method == "PATCH":
        if call.headers.get("content-type") != "application/merge-patch+json":
            raise not_modelled("patches of scales other than merge patches")
        wanted = merge_patch(current, wanted)
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


@contextlib.asynccontextmanager
async def proxied(
    cluster: Cluster, resource: Resource, call: Call, client: httpx.AsyncClient
) -> AsyncIterator[httpx.Response]:
    """A pod's answer to `pods/<name>:<port>/proxy/<path>`, whose body is read as it comes."""
    full = call.name
    call.name, _, port = full.partition(":")
    if not port.isdigit() or call.method != "GET":
        raise not_modelled("a pod's proxy by scheme or by the name of a port, or for other methods than GET")
    try:
        stored = handlers.found(cluster, resource, call)
    finally:
        call.name = full
    address = (stored.obj.get("status") or {}).get("podIP")
    if not address:
        raise bad_request(f"address not allowed: pod {full} has no IP")
    # The name by which the API server was asked goes on to the pod, as do headers: that of a hosted cluster is public.
    headers = {
        "host": "cluster.example.com",
        **{name: call.headers[name] for name in call.headers if name.startswith(("sec-", "x-"))},
    }
    request = client.build_request("GET", f"http://{address}:{port}/{call.tail}", params=call.query, headers=headers)
    try:
        answer = await client.send(request, stream=True)
    except httpx.HTTPError as error:
        raise ApiError(503, f"error trying to reach service: {error}", "ServiceUnavailable") from None
    try:
        yield answer
    finally:
        await answer.aclose()
