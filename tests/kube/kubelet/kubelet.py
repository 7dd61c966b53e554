"""Takes pods onto the node and keeps what runs in step with what the API server says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tests.kube.kubelet.client import PODS, Key, Object, key_of
from tests.kube.kubelet.informer import Informer
from tests.kube.kubelet.machine import Machine
from tests.kube.kubelet.pod import Pod
from tests.kube.kubelet.rollout import is_active
from tests.kube.kubelet.workqueue import WorkQueue

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
"""Starts a task (with a name) whose crash is the node's."""


class Kubelet:
    """Every pod runs on this node: it binds those that have none."""

    def __init__(self, machine: Machine, pods: Informer, spawn: Spawn) -> None:
        self.pods: dict[str, Pod] = {}
        """By uid."""
        self._machine = machine
        self._informer = pods
        self._spawn = spawn
        self.queue = WorkQueue(self._place)
        pods.on_change(self._on_pod)

    def _on_pod(self, item: Object, exists: bool) -> None:
        uid = item["metadata"]["uid"]
        if (pod := self.pods.get(uid)) is not None:
            pod.update(item) if exists else pod.removed()
        elif exists and self._is_ours_to_do(item):
            self.queue.add(key_of(item))

    def _is_ours_to_do(self, item: Object) -> bool:
        return item["spec"].get("nodeName") in (None, "", self._machine.name)

    async def _place(self, key: Key) -> None:
        """Binds a pod, starts one that is bound, and removes one that ends without having been started."""
        item = self._informer.get(key)
        if item is None or item["metadata"]["uid"] in self.pods:
            return
        if "deletionTimestamp" in item["metadata"]:
            uid = {"uid": item["metadata"]["uid"]}
            await self._machine.api.delete(PODS, key, gracePeriodSeconds=0, preconditions=uid)
            self._informer.deleted(item)
        elif not item["spec"].get("nodeName"):
            await self._machine.api.bind(key, self._machine.name)
            message = f"Successfully assigned {key[0]}/{key[1]} to {self._machine.name}"
            self._machine.events.say(PODS, item, "Scheduled", message, warning=False)
            self._informer.wrote(await self._machine.api.get(PODS, key))
        elif is_active(item):
            pod = self.pods[item["metadata"]["uid"]] = Pod(self._machine, item, self._wrote(item))
            self._spawn(self._run(item["metadata"]["uid"], pod), f"pod {key[1]}")

    def _wrote(self, item: Object) -> Callable[[Object | None], None]:
        def wrote(written: Object | None) -> None:
            if written is None:
                self._informer.deleted(item)
            else:
                self._informer.wrote(written)

        return wrote

    async def _run(self, uid: str, pod: Pod) -> None:
        try:
            await pod.run()
        finally:
            del self.pods[uid]
