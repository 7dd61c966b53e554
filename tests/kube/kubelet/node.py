"""The node: everything of a cluster that works between the API server and the processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.kube.apiserver import FakeApiServer
from tests.kube.kubelet.api import Api
from tests.kube.kubelet.container import Container
from tests.kube.kubelet.deployments import Deployments, Quotas
from tests.kube.kubelet.endpoints import EndpointSlices
from tests.kube.kubelet.images import Images
from tests.kube.kubelet.machine import Machine, Timing
from tests.kube.kubelet.network import HTTPS, FrontDoor, Loopback, ServiceProxy
from tests.kube.kubelet.pod import Kubelet, Pod
from tests.kube.kubelet.process import Isolation, isolation
from tests.kube.kubelet.volumes import Credentials

logger = logging.getLogger(__name__)

HOST, PORT = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"
"""Where clients in a pod look for the API server."""


@dataclass(frozen=True, slots=True)
class PodInfo:
    """A pod on this node. `pid` and `log` are its first container's; `pids` has those that run, by container."""

    namespace: str
    name: str
    ip: str
    pid: int | None
    log: Path
    pids: dict[str, int]
    restarts: int


class FakeNode:
    """Plays the Deployment controller, the kubelet, the EndpointSlice controller and the Service proxy.

    Entering the context begins to reconcile what the API server has, leaving it ends every process at once and raises
    what went wrong within. Containers are processes of this machine that listen on 127.x.y.z addresses, and write to
    `logs`.
    """

    def __init__(self, server: FakeApiServer, *, logs: Path, timing: Timing | None = None) -> None:
        self._server = server
        self._logs = logs
        self._timing = timing or Timing()
        self._images = Images()
        self._tasks: set[asyncio.Task[None]] = set()
        self._crashes: list[BaseException] = []
        self._cleanup = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        async with contextlib.AsyncExitStack() as cleanup:
            loopback = cleanup.enter_context(contextlib.closing(Loopback()))
            session = await cleanup.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            read_end, write_end = os.pipe()
            cleanup.callback(os.close, read_end)
            cleanup.callback(os.close, write_end)
            self.isolation = await asyncio.to_thread(isolation)
            url, door = self._server.url, None
            if self.isolation is Isolation.FULL:
                door = FrontDoor(loopback.service(), url, self._spawn)
            machine = Machine(
                api=cleanup.enter_context(contextlib.closing(Api(self._server.cluster))),
                session=session,
                loopback=loopback,
                logs=self._logs,
                parent_pipe=read_end,
                isolation=self.isolation,
                credentials=Credentials(self._server.account_token, b"" if door is None else door.certificate, url),
                always={} if door is None else {HOST: door.address, PORT: str(HTTPS)},
                timing=self._timing,
                images=self._images,
            )
            cleanup.push_async_callback(self._stop)
            if door is not None:
                self._spawn(door.run(), "front door")
            self._start(machine)
            self._cleanup = cleanup.pop_all()
        return self

    def _start(self, machine: Machine) -> None:
        api, timing = machine.api, machine.timing
        self._quotas = Quotas(api)
        self._kubelet = Kubelet(machine, self._spawn)
        self._deployments = Deployments(api, self._quotas, timing)
        self._proxy = ServiceProxy(api, machine.loopback, timing.proxy_delay, self._spawn)
        self._spawn(self._proxy.run(), "service proxy")
        for controller in (self._kubelet, self._deployments, EndpointSlices(api)):
            self._spawn(controller.queue.run(), type(controller).__name__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._cleanup.aclose()
        if self._crashes and error is None:
            raise self._crashes[0]

    async def _stop(self) -> None:
        for pod in list(self._kubelet.pods.values()):
            for container in pod.containers:
                container.kill()
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(list(self._tasks))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crashes.append(error)
            logger.error("the fake node's task %r crashed", task.get_name(), exc_info=error)

    @property
    def crashed(self) -> bool:
        """Whether something went wrong within, which leaving the context will raise."""
        return bool(self._crashes)

    def pods(self) -> list[PodInfo]:
        """The pods on this node, those that end included until their deletion is confirmed, by namespace and name."""
        return sorted(map(_info, self._kubelet.pods.values()), key=lambda each: (each.namespace, each.name))

    def kill(
        self,
        pod: str,
        number: signal.Signals = signal.SIGKILL,
        *,
        namespace: str | None = None,
        container: str | None = None,
    ) -> None:
        """Sends a signal to the process of a container (the first one). Raises `LookupError` when none runs."""
        for each in self._containers(pod, namespace):
            if container in (None, each.record.name) and each.pid is not None:
                each.signal(number)
                return
        raise LookupError(f"no container {container or ''} of pod {pod} runs here")

    def _containers(self, pod: str, namespace: str | None) -> Iterable[Container]:
        for each in self._kubelet.pods.values():
            metadata = each.document["metadata"]
            if metadata["name"] == pod and namespace in (None, metadata["namespace"]):
                yield from each.containers

    def cluster_ip(self, namespace: str, service: str) -> str:
        """The address at which this machine reaches a Service, whatever its `spec.clusterIP` says."""
        return self._proxy.address((namespace, service))

    def refuse_image(self, image: str) -> None:
        """From now on the image cannot be pulled. What runs with it goes on."""
        self._images.refuse(image)

    def quota(self, namespace: str, pods: int | None) -> None:
        """From now on the namespace takes at most this many pods (None: any number); those it has stay."""
        self._quotas.set(namespace, pods)
        self._deployments.everything()


def _info(pod: Pod) -> PodInfo:
    metadata, first = pod.document["metadata"], pod.containers[0]
    return PodInfo(
        namespace=metadata["namespace"],
        name=metadata["name"],
        ip=pod.ip,
        pid=first.pid,
        log=first.log,
        pids={each.record.name: each.pid for each in pod.containers if each.pid is not None},
        restarts=sum(each.record.restarts for each in pod.containers),
    )
