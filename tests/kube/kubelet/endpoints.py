"""The EndpointSlice controller: slices of every Service that has a selector."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from tests.kube.kubelet.client import ENDPOINT_SLICES, Api, Key, Object, key_of
from tests.kube.kubelet.informer import Informer
from tests.kube.kubelet.slices import MANAGED_BY, MANAGER, SERVICE_NAME, Content, contents, labels, owner, selects
from tests.kube.kubelet.workqueue import WorkQueue


class EndpointSlices:
    """Reconciles the slices of Services, by the Services' names. Slices that others manage are left alone."""

    def __init__(self, api: Api, services: Informer, pods: Informer, slices: Informer) -> None:
        self._api = api
        self._services = services
        self._pods = pods
        self._slices = slices
        self._labels: dict[str, Object] = {}
        self.queue = WorkQueue(self._reconcile)
        services.on_change(lambda item, _: self.queue.add(key_of(item)))
        slices.on_change(self._on_slice)
        pods.on_change(self._on_pod)

    def _on_slice(self, item: Object, exists: bool) -> None:
        if service := _service_of(item):
            self.queue.add(service)

    def _on_pod(self, item: Object, exists: bool) -> None:
        uid = item["metadata"]["uid"]
        for service in self._services:
            selector = service["spec"].get("selector")
            # A pod whose labels changed leaves the Services that selected it before.
            before = self._labels.get(uid)
            touched = any(selector and selects(selector, each) for each in (item, before or item))
            if touched and service["metadata"]["namespace"] == item["metadata"]["namespace"]:
                self.queue.add(key_of(service))
        if exists:
            self._labels[uid] = {"metadata": {"labels": item["metadata"].get("labels")}}
        else:
            self._labels.pop(uid, None)

    async def _reconcile(self, key: Key) -> None:
        service = self._services.get(key)
        present = [each for each in self._slices if _service_of(each) == key]
        if service is None:
            # They go with their Service; this is what is left when nobody collects garbage.
            for each in present:
                await self._delete(each)
            return
        if not service["spec"].get("selector"):
            return
        pods = [pod for pod in self._pods if pod["metadata"]["namespace"] == key[0]]
        spare = [each for each in present if _owned(each, service)]
        for content in contents(service, pods):
            match = _closest(content, spare)
            if match is None:
                await self._create(service, content)
                continue
            spare.remove(match)
            wanted = {"ports": content.ports, "endpoints": content.endpoints}
            changed = any((match.get(field) or []) != value for field, value in wanted.items())
            if changed or match["metadata"].get("labels") != labels(service):
                patch = {**wanted, "metadata": {"labels": labels(service)}}
                self._slices.wrote(await self._api.patch(ENDPOINT_SLICES, key_of(match), patch))
        for each in spare:
            await self._delete(each)

    async def _create(self, service: Object, content: Content) -> None:
        name = service["metadata"]["name"]
        created = await self._api.create(
            ENDPOINT_SLICES,
            {
                "metadata": {
                    "namespace": service["metadata"]["namespace"],
                    "name": f"{name}-{secrets.token_hex(3)[:5]}",
                    "generateName": f"{name}-",
                    "labels": labels(service),
                    "ownerReferences": [owner(service)],
                },
                "addressType": "IPv4",
                "ports": content.ports,
                "endpoints": content.endpoints,
            },
        )
        self._slices.wrote(created)

    async def _delete(self, item: Object) -> None:
        await self._api.delete(ENDPOINT_SLICES, key_of(item), preconditions={"uid": item["metadata"]["uid"]})
        self._slices.deleted(item)


def _service_of(item: Object) -> Key | None:
    """The Service of a slice of ours."""
    marks = item["metadata"].get("labels") or {}
    if marks.get(MANAGER) != MANAGED_BY or SERVICE_NAME not in marks:
        return None
    return item["metadata"]["namespace"], marks[SERVICE_NAME]


def _owned(item: Object, service: Object) -> bool:
    references = item["metadata"].get("ownerReferences") or ()
    return any(each["uid"] == service["metadata"]["uid"] for each in references)


def _closest(content: Content, candidates: Sequence[Object]) -> Object | None:
    """The slice with the same ports, else any."""
    same = (each for each in candidates if (each.get("ports") or []) == content.ports)
    return next(same, next(iter(candidates), None))
