"""One pod on the node: its address, its containers, its status, its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tests.kube.kubelet.client import PODS, TRANSIENT, ApiError, Object, key_of, now
from tests.kube.kubelet.container import LEAST_GRACE, Container
from tests.kube.kubelet.machine import Machine
from tests.kube.kubelet.played import unplayed
from tests.kube.kubelet.podstatus import Place, Waiting, pod_status
from tests.kube.kubelet.volumes import PodVolumes

RETRY = 0.1
LONGEST_RETRY = 1.0
DEFAULT_GRACE = 30


class Pod:
    """Runs a pod from the moment it was given to this node until it is deleted from the API server.

    `wrote` is called with the pod as each write of ours left it, None once it is gone.
    """

    def __init__(self, machine: Machine, pod: Object, wrote: Callable[[Object | None], None]) -> None:
        self.ip = machine.loopback.pod()
        self.document = pod
        self._machine = machine
        self._wrote = wrote
        self._place = Place(self.ip, machine.loopback.node_ip, now())
        self._dirty = asyncio.Event()
        self._ending = asyncio.Event()
        self._grace = float(DEFAULT_GRACE)
        self._gone = False
        self._over = False
        spec, folder = pod["spec"], machine.logs / "volumes" / pod["metadata"]["uid"]
        self._volumes = volumes = PodVolumes(folder, machine.api, machine.credentials)
        policy = spec.get("restartPolicy", "Always")

        def container(spec: Mapping[str, Any], policy: str) -> Container:
            return Container(machine, spec, self.ip, volumes, policy, lambda: self.document, self._dirty.set)

        self._main = [container(each, policy) for each in spec["containers"]]
        self._init = [
            container(each, each.get("restartPolicy") or ("Never" if policy == "Never" else "OnFailure"))
            for each in spec.get("initContainers") or ()
        ]
        for each in self._init:
            each.record.sidecar = each.spec.get("restartPolicy") == "Always"
        if self._init:
            for each in self._main:
                each.record.state = Waiting("PodInitializing")
        self.containers = [*self._main, *self._init]
        self._running: list[asyncio.Task[None]] = []

    def update(self, pod: Object) -> None:
        """The pod as the API server has it now."""
        self.document = pod
        metadata = pod["metadata"]
        if "deletionTimestamp" in metadata:
            spec = pod["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE)
            self._end(metadata.get("deletionGracePeriodSeconds", spec))

    def removed(self) -> None:
        """The API server does not know the pod any more: nobody waits for it to end well."""
        self._gone = True
        self._end(0)
        for container in self.containers:
            container.kill()

    def _end(self, grace: float) -> None:
        if self._ending.is_set() and grace < self._grace:
            # Told again, and to be quicker.
            for container in self.containers:
                asyncio.get_running_loop().call_later(grace, container.kill)
        self._grace = grace
        self._ending.set()

    async def run(self) -> None:
        """Returns when the pod is gone from this node and from the API server."""
        if unknown := unplayed(self.document):
            # Better than a pod that runs without what it asked for.
            raise NotImplementedError(f"{key_of(self.document)}: the fake node does not play {', '.join(unknown)}")
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(self._report())
            starting = group.create_task(self._start(group))
            self._dirty.set()
            await self._ending.wait()
            starting.cancel()
            if not self._gone:
                for each in self.containers:
                    said = f"Stopping container {each.record.name}"
                    self._machine.events.say(PODS, self.document, "Killing", said, warning=False)
            await self._stop()
            if self._running:
                await asyncio.wait(self._running)
            self._over = True
            reporting.cancel()
        self._volumes.remove()
        if not self._gone:
            await self._retried(self._write)
            await self._retried(self._delete)

    async def _start(self, group: asyncio.TaskGroup) -> None:
        """Init containers one after the other, then all others at once; sidecars end after those have."""
        for each in self._init:
            running = group.create_task(each.run())
            self._running.append(running)
            if each.record.sidecar:
                await each.started.wait()
                continue
            await asyncio.wait([running])
            if each.record.broken:
                return
            each.record.ready = True
            self._dirty.set()
        mains = [group.create_task(each.run()) for each in self._main]
        self._running.extend(mains)
        await asyncio.wait(mains)
        await self._stop()

    async def _stop(self) -> None:
        """Ends what runs: the containers at once, then the sidecars, the last one first, in the time that is left."""
        deadline = asyncio.get_running_loop().time() + self._grace
        await asyncio.gather(*(each.stop(self._grace) for each in self._main))
        for each in reversed(self._init):
            left = deadline - asyncio.get_running_loop().time()
            await each.stop(max(left, LEAST_GRACE) if self._grace > 0 else 0.0)

    async def _report(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._retried(self._write)

    async def _retried(self, write: Callable[[], Awaitable[None]]) -> None:
        delay = RETRY
        while True:
            with contextlib.suppress(ApiError, *TRANSIENT):
                await write()
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_RETRY)

    async def _write(self) -> None:
        records, before = [each.record for each in self._main], [each.record for each in self._init]
        status = pod_status(self.document, records, self._place, now(), terminal=self._over, before=before)
        present = self.document.get("status", {})
        if any(present.get(field) != value for field, value in status.items()):
            answer = await self._machine.api.patch(PODS, key_of(self.document), {"status": status}, "status")
            if answer is not None and answer["metadata"]["uid"] == self.document["metadata"]["uid"]:
                # Events of the watch may have brought a newer one meanwhile: the informer knows.
                self._wrote(answer)

    async def _delete(self) -> None:
        metadata = self.document["metadata"]
        uid = {"uid": metadata["uid"]}
        await self._machine.api.delete(PODS, key_of(self.document), gracePeriodSeconds=0, preconditions=uid)
        self._wrote(None)
