"""Pods on the node: which are taken, their addresses and containers, their status, their end.

Played: binding to the one node, init containers, native sidecars before and after all others, graceful deletion.
Checked by `test_kubelet*.py` and `test_pod_surroundings.py`. A pod with any field beyond those named here is refused:
the node crashes, and the test with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

from tests.kube.kubelet.api import PODS, Key, Object, WorkQueue, key_of, now
from tests.kube.kubelet.container import LEAST_GRACE, Container
from tests.kube.kubelet.environment import ConfigError
from tests.kube.kubelet.machine import Machine
from tests.kube.kubelet.podstatus import Place, Waiting, pod_status
from tests.kube.kubelet.rollout import is_active
from tests.kube.kubelet.volumes import PodVolumes, is_followed

DEFAULT_GRACE = 30

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
"""Starts a task (with a name) whose crash is the node's."""
Spec = Mapping[str, Any]
POD = {
    *("containers", "initContainers", "volumes", "restartPolicy", "terminationGracePeriodSeconds", "nodeName"),
    *("serviceAccountName", "serviceAccount", "automountServiceAccountToken", "securityContext"),
}
PASSED_OVER = {
    # One node, which takes every pod; whose images need no secret; where names of Services do not resolve.
    *("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "schedulerName", "priorityClassName"),
    *("priority", "preemptionPolicy", "imagePullSecrets", "dnsPolicy", "overhead"),
}
POD_SECURITY = {"runAsUser", "runAsGroup", "runAsNonRoot", "fsGroup", "supplementalGroups", "seccompProfile"}
CONTAINER = {
    *("name", "image", "imagePullPolicy", "command", "args", "env", "envFrom", "ports", "volumeMounts", "lifecycle"),
    *("readinessProbe", "livenessProbe", "startupProbe", "securityContext", "restartPolicy"),
    # Passed over.
    *("resources", "terminationMessagePath", "terminationMessagePolicy"),
}
SECURITY = {
    *("allowPrivilegeEscalation", "readOnlyRootFilesystem", "runAsUser", "runAsGroup", "runAsNonRoot", "capabilities"),
    "seccompProfile",  # passed over
}
PROBE = {"httpGet", "periodSeconds", "timeoutSeconds", "initialDelaySeconds", "failureThreshold", "successThreshold"}
BELOW = {
    # What is known of each part of a container.
    "lifecycle": {"preStop"},
    "lifecycle.preStop": {"exec"},
    "securityContext": SECURITY,
    "securityContext.capabilities": {"drop"},
    **{f"{kind}Probe": PROBE for kind in ("readiness", "liveness", "startup")},
    **{f"{kind}Probe.httpGet": {"path", "port", "scheme"} for kind in ("readiness", "liveness", "startup")},
}


VOLUMES_INTERVAL = 1.0
"""Seconds between two looks at the ConfigMaps and Secrets of a pod's volumes."""


class Pod:
    """Runs a pod from the moment it was given to this node until it is deleted from the API server."""

    def __init__(self, machine: Machine, pod: Object) -> None:
        self.ip = machine.loopback.pod()
        self.document = pod
        self._machine = machine
        self._place = Place(self.ip, machine.loopback.node_ip, now())
        self._dirty = asyncio.Event()
        self._ending = asyncio.Event()
        self._grace = float(DEFAULT_GRACE)
        self._gone = False
        self._over = False
        spec, folder = pod["spec"], machine.logs / "volumes" / pod["metadata"]["uid"]
        self._volumes = volumes = PodVolumes(folder, machine.api, machine.credentials, self.ip)

        def container(spec: Mapping[str, Any]) -> Container:
            return Container(machine, spec, self.ip, volumes, lambda: self.document, self._dirty.set)

        self._main = [container(each) for each in spec["containers"]]
        self._before = [container(each) for each in spec.get("initContainers") or ()]
        if self._before:
            for each in self._main:
                each.record.state = Waiting("PodInitializing")
        for each in self._before:
            each.record.completes = each.spec.get("restartPolicy") != "Always"
        self._sidecars = [each for each in self._before if not each.record.completes]
        self.containers = [*self._main, *self._before]
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
            refreshing = group.create_task(self._refresh_volumes())
            self._dirty.set()
            await self._ending.wait()
            starting.cancel()
            if not self._gone:
                for each in self.containers:
                    said = f"Stopping container {each.record.name}"
                    self._machine.api.say(PODS, self.document, "Killing", said)
            await self._stop()
            if self._running:
                await asyncio.wait(self._running)
            self._over = True
            reporting.cancel()
            refreshing.cancel()
        self._volumes.remove()
        if not self._gone:
            self._write()
            self._machine.api.delete(PODS, self.document, grace=0)

    async def _refresh_volumes(self) -> None:
        """Files follow their ConfigMaps and Secrets, also under a running container."""
        while any(map(is_followed, self.document["spec"].get("volumes") or ())):
            await asyncio.sleep(VOLUMES_INTERVAL)
            with contextlib.suppress(ConfigError):  # a deleted one leaves its files behind
                self._volumes.refresh(self.document)

    async def _start(self, group: asyncio.TaskGroup) -> None:
        """Init containers and sidecars one after the other, then all others at once."""
        for each in self._before:
            running = group.create_task(each.run())
            self._running.append(running)
            await (running if each.record.completes else each.started.wait())
        self._running += [group.create_task(each.run()) for each in self._main]

    async def _stop(self) -> None:
        """Ends what runs: the containers at once, then the sidecars, the last one first, in the time that is left."""
        deadline = asyncio.get_running_loop().time() + self._grace
        initial = [each for each in self._before if each.record.completes]
        await asyncio.gather(*(each.stop(self._grace) for each in (*self._main, *initial)))
        for each in reversed(self._sidecars):
            left = deadline - asyncio.get_running_loop().time()
            await each.stop(max(left, LEAST_GRACE) if self._grace > 0 else 0.0)

    async def _report(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._write()

    def _write(self) -> None:
        records, before = [each.record for each in self._main], [each.record for each in self._before]
        status = pod_status(self.document, records, self._place, now(), terminal=self._over, before=before)
        present = self.document.get("status", {})
        if any(present.get(field) != value for field, value in status.items()):
            self._machine.api.patch(PODS, key_of(self.document), {"status": status}, "status")


class Kubelet:
    """Every pod runs on this node: it binds those that have none."""

    def __init__(self, machine: Machine, spawn: Spawn) -> None:
        self.pods: dict[str, Pod] = {}
        """By uid."""
        self._machine = machine
        self._spawn = spawn
        self.queue = WorkQueue(self._place)
        machine.api.on_change(PODS, self._on_pod)

    def _on_pod(self, item: Object, exists: bool) -> None:
        uid = item["metadata"]["uid"]
        if (pod := self.pods.get(uid)) is not None:
            pod.update(item) if exists else pod.removed()
        elif exists and self._is_ours_to_do(item):
            self.queue.add(key_of(item))

    def _is_ours_to_do(self, item: Object) -> bool:
        return item["spec"].get("nodeName") in (None, "", self._machine.name)

    def _place(self, key: Key) -> None:
        """Binds a pod, starts one that is bound, and removes one that ends without having been started."""
        machine = self._machine
        item = machine.api.get(PODS, key)
        if item is None or item["metadata"]["uid"] in self.pods:
            return
        if "deletionTimestamp" in item["metadata"]:
            machine.api.delete(PODS, item, grace=0)
        elif not item["spec"].get("nodeName"):
            # As a scheduler does it, but for the binding, which the fake API server does not have.
            machine.api.patch(PODS, key, {"spec": {"nodeName": machine.name}})
            machine.api.say(PODS, item, "Scheduled", f"Successfully assigned {key[0]}/{key[1]} to {machine.name}")
        elif is_active(item):
            pod = self.pods[item["metadata"]["uid"]] = Pod(machine, item)
            self._spawn(self._run(item["metadata"]["uid"], pod), f"pod {key[1]}")

    async def _run(self, uid: str, pod: Pod) -> None:
        try:
            await pod.run()
        finally:
            del self.pods[uid]


def unplayed(pod: Spec) -> list[str]:
    """Paths of the fields of this pod that the node does not know."""
    return sorted(_unplayed(pod["spec"]))


def _unplayed(spec: Spec) -> Iterator[str]:
    yield from _beyond("spec", spec, POD | PASSED_OVER | {"enableServiceLinks"})
    yield from _beyond("spec.securityContext", spec.get("securityContext"), POD_SECURITY)
    if spec.get("enableServiceLinks", True):
        yield "spec.enableServiceLinks: true"
    if spec.get("restartPolicy", "Always") != "Always":
        yield f"spec.restartPolicy: {spec['restartPolicy']}"
    for kind in ("initContainers", "containers"):
        for each in spec.get(kind) or ():
            yield from _unplayed_container(f"spec.{kind}[{each['name']}]", each)
    for volume in spec.get("volumes") or ():
        where = f"spec.volumes[{volume['name']}]"
        yield from _beyond(where, volume, {"name", "emptyDir", "configMap", "secret"})
        yield from _beyond(f"{where}.configMap", volume.get("configMap"), {"name", "defaultMode"})
        yield from _beyond(f"{where}.secret", volume.get("secret"), {"secretName", "defaultMode"})


def _unplayed_container(path: str, container: Spec) -> Iterator[str]:
    yield from _beyond(path, container, CONTAINER)
    for where, known in BELOW.items():
        part: Any = container
        for name in where.split("."):
            part = (part or {}).get(name)
        yield from _beyond(f"{path}.{where}", part, known)
    for field, known in (
        ("env", {"name", "value", "valueFrom"}), ("envFrom", {"configMapRef"}),
        ("volumeMounts", {"name", "mountPath", "readOnly"}),
    ):  # fmt: skip
        for each in container.get(field) or ():
            where = f"{path}.{field}[{each.get('name', '')}]"
            yield from _beyond(where, each, known)
            yield from _beyond(f"{where}.valueFrom", each.get("valueFrom"), {"fieldRef"})


def _beyond(path: str, given: Spec | None, known: set[str]) -> Iterator[str]:
    # What is null, false or empty asks for nothing.
    return (f"{path}.{name}" for name, value in (given or {}).items() if name not in known and value)
