"""Reads everything that the page needs, all at the same time. What cannot be read is noted, and the rest is read."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from controller.api.model import API_VERSION
from controller.objects.names import MANAGEMENT_PORT, Component
from controller.status import raw
from controller.status.pods import active, is_ready, is_running, management_secret
from controller.status.report import ReportError, RouterReport, parse_report
from kvcluster.management_token import NoTokenError, pod_headers
from runtime.kube.client import ApiServer
from runtime.kube.errors import KubeApiError

PLURAL = "kvclusters"
EVENT_LIMIT = "500"
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_GENERATED = "[bcdfghjklmnpqrstvwxz0-9]+"

Raw = dict[str, Any]


class BadNameError(ValueError):
    """No object in a cluster can have this name."""


class NotFoundError(LookupError):
    """There is no such KVCluster; the message says what there is instead."""


@dataclass(frozen=True, slots=True)
class RouterAnswer:
    """The answers of a router pod, through the API server's proxy."""

    pod: str
    report: RouterReport | None
    workers: tuple[Raw, ...] | None
    """Rows of `GET /workers`."""
    error: str = ""
    """Why report or workers are missing."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """What could be read of a KVCluster and its objects."""

    server: str
    namespace: str
    cluster: Raw
    pods: tuple[Raw, ...] = ()
    events: tuple[Raw, ...] = ()
    routers: tuple[RouterAnswer, ...] = ()
    unread: tuple[str, ...] = field(default=())
    """What could not be read, and why."""


def check_names(name: str, namespace: str | None) -> None:
    """Raises `BadNameError` if no KVCluster, or no namespace, can be called that."""
    for what, text in (("name", name), ("namespace", namespace)):
        if text is not None and not _NAME.fullmatch(text):
            raise BadNameError(f"{text!r} is no {what}: use lower-case letters, digits and hyphens")


async def gather(api: ApiServer, name: str, namespace: str) -> Gathered:
    """Reads a KVCluster and what belongs to it. Raises `NotFoundError`, or `KubeApiError` for the KVCluster itself."""
    cluster = await find_cluster(api, name, namespace)
    unread: list[str] = []
    core = f"/api/v1/namespaces/{_segment(namespace)}"
    # The controller of a Helm release with the KVCluster's name has the same labels name and instance.
    components = f"app.kubernetes.io/component in ({','.join(Component)})"
    labels = f"{_labels(name)},{components}"
    of_cluster = f"involvedObject.kind=KVCluster,involvedObject.name={name}"
    pods, own, warnings = await asyncio.gather(
        _items(api, "pods", f"{core}/pods", {"labelSelector": labels}, unread),
        _items(api, "events", f"{core}/events", {"fieldSelector": of_cluster, "limit": EVENT_LIMIT}, unread),
        _items(api, "events", f"{core}/events", {"fieldSelector": "type=Warning", "limit": EVENT_LIMIT}, unread),
    )
    names = frozenset(raw.name(pod) for pod in pods)
    routers = await asyncio.gather(
        *(_router(api, namespace, pod) for pod in active(pods, Component.ROUTER) if is_running(pod))
    )
    return Gathered(
        server=api.url,
        namespace=namespace,
        cluster=cluster,
        pods=tuple(pods),
        events=(*own, *(event for event in warnings if _of_objects(event, name, names))),
        routers=tuple(routers),
        unread=tuple(dict.fromkeys(unread)),
    )


@dataclass(frozen=True, slots=True)
class RouterPod:
    """A router pod that runs."""

    name: str
    secret: str
    """Name of the Secret with the tokens that its management port asks for; empty where it asks for none."""


async def router_pods(api: ApiServer, name: str, namespace: str) -> list[RouterPod]:
    """The router pods of a KVCluster that run, those that are ready first. Raises `KubeApiError`."""
    selector = f"{_labels(name)},app.kubernetes.io/component={Component.ROUTER}"
    answer = await api.request_object(
        "GET", f"/api/v1/namespaces/{_segment(namespace)}/pods", {"labelSelector": selector}
    )
    pods = [dict(item) for item in raw.objects(answer, "items")]
    running = [pod for pod in active(pods, Component.ROUTER) if is_running(pod)]
    ordered = sorted(running, key=lambda pod: not is_ready(pod))
    return [RouterPod(raw.name(pod), management_secret(pod)) for pod in ordered]


def _labels(name: str) -> str:
    return f"app.kubernetes.io/name=kvcluster,app.kubernetes.io/instance={name}"


async def find_cluster(api: ApiServer, name: str, namespace: str) -> Raw:
    """The KVCluster. Raises `NotFoundError` or `KubeApiError`."""
    collection = f"/apis/{API_VERSION}/namespaces/{_segment(namespace)}/{PLURAL}"
    try:
        return await api.request_object("GET", f"{collection}/{_segment(name)}")
    except KubeApiError as error:
        if error.status != 404:
            raise
    try:
        others = [raw.name(item) for item in raw.objects(await api.request_object("GET", collection), "items")]
    except KubeApiError as error:
        if error.status != 404:
            others = []
        else:
            raise NotFoundError(
                f"{api.url} does not know KVClusters: install the chart (deploy/helm/kvcluster) there first"
            ) from None
    there = f"there are: {', '.join(sorted(others))}" if others else "there is none; -n names another namespace"
    raise NotFoundError(f"no KVCluster {name} in namespace {namespace} of {api.url}; {there}")


async def _items(api: ApiServer, what: str, path: str, query: Mapping[str, str], unread: list[str]) -> list[Raw]:
    try:
        return [dict(item) for item in raw.objects(await api.request_object("GET", path, query), "items")]
    except KubeApiError as error:
        unread.append(f"{what} could not be read: {error}")
        return []


def _of_objects(event: Raw, name: str, pods: frozenset[str]) -> bool:
    """Whether the event is about an object of the cluster: a pod (even a deleted one), a Deployment, a ReplicaSet."""
    if raw.text(event, "involvedObject", "kind") == "KVCluster":
        return False
    subject = raw.text(event, "involvedObject", "name")
    # Another cluster may be called `rag-worker`: only suffixes that Kubernetes generates (without vowels) may follow.
    return subject in pods or re.fullmatch(f"{re.escape(name)}-(worker|router)(-{_GENERATED})*", subject) is not None


async def _router(api: ApiServer, namespace: str, pod: raw.Raw) -> RouterAnswer:
    name = raw.name(pod)
    proxy = f"/api/v1/namespaces/{_segment(namespace)}/pods/{_segment(name)}:{MANAGEMENT_PORT}/proxy"
    errors: dict[str, str] = {}
    try:
        headers = await pod_headers(api, namespace, management_secret(pod))
    except (KubeApiError, NoTokenError) as error:
        return RouterAnswer(name, None, None, str(error))

    async def report() -> RouterReport | None:
        try:
            return parse_report(await api.request("GET", f"{proxy}/status", headers=headers))
        except (KubeApiError, ReportError) as error:
            errors["report"] = str(error)
            return None

    async def workers() -> tuple[Raw, ...] | None:
        try:
            answer = await api.request_object("GET", f"{proxy}/workers", headers=headers)
        except KubeApiError as error:
            errors["workers"] = str(error)
            return None
        return tuple(dict(row) for row in raw.objects(answer, "workers"))

    answers = await asyncio.gather(report(), workers())
    return RouterAnswer(name, *answers, errors.get("report") or errors.get("workers", ""))


def _segment(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe=":")
