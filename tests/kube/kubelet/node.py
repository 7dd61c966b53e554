"""The node: everything of a cluster that works between the API server and the processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.kube.kubelet.client import DEPLOYMENTS, ENDPOINT_SLICES, PODS, REPLICA_SETS, SERVICES, Api, Events
from tests.kube.kubelet.container import Container
from tests.kube.kubelet.deployments import Deployments, Quotas
from tests.kube.kubelet.endpoints import EndpointSlices
from tests.kube.kubelet.images import Image, Images, known
from tests.kube.kubelet.informer import Informer, WorkQueue
from tests.kube.kubelet.machine import Machine, Timing
from tests.kube.kubelet.network import HTTPS, FrontDoor, Loopback, ServiceProxy
from tests.kube.kubelet.pod import Kubelet, Pod
from tests.kube.kubelet.process import Isolation, isolation
from tests.kube.kubelet.volumes import Credentials, Tokens

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
    logs: dict[str, Path]
    restarts: int
    ready: bool
    terminating: bool


class FakeNode:
    """Plays the Deployment controller, the kubelet, the EndpointSlice controller and the Service proxy.

    Entering the context begins to reconcile what the API server has, leaving it ends every process at once and raises
    what went wrong within. Containers are processes of this machine that listen on 127.x.y.z addresses, and write to
    `logs`. `tokens` gives the bearer token of a service account; without it no pod gets one. `images` says what is in
    an image. `isolation` is found out unless it is given.
    """

    def __init__(
        self,
        api_url: str,
        *,
        logs: Path,
        tokens: Tokens | None = None,
        timing: Timing | None = None,
        images: Callable[[str], Image] = known,
        isolation: Isolation | None = None,
    ) -> None:
        self._api_url = api_url
        self._logs = logs
        self._tokens = tokens
        self._isolation = isolation
        self._timing = timing or Timing()
        self._images = Images(images)
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
            if self._isolation is None:
                self._isolation = await asyncio.to_thread(isolation)
            door = (
                FrontDoor(loopback.service(), self._api_url, self._spawn) if self._isolation is Isolation.FULL else None
            )
            api = Api(self._api_url, session)
            events = Events(api)
            machine = Machine(
                api=api,
                session=session,
                events=events,
                loopback=loopback,
                logs=self._logs,
                parent_pipe=read_end,
                isolation=self._isolation,
                credentials=self._credentials(door),
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

    def _credentials(self, door: FrontDoor | None) -> Credentials | None:
        if self._tokens is None:
            return None
        return Credentials(self._tokens, b"" if door is None else door.certificate, self._api_url)

    @property
    def isolation(self) -> Isolation:
        """How much of a container's surroundings this machine lets the node make."""
        assert self._isolation is not None
        return self._isolation

    def _start(self, machine: Machine) -> None:
        api, events, timing = machine.api, machine.events, machine.timing
        kinds = (PODS, SERVICES, ENDPOINT_SLICES, DEPLOYMENTS, REPLICA_SETS)
        pods, services, slices, deployments, replica_sets = informers = [Informer(api, kind) for kind in kinds]
        self._quotas = Quotas(pods)
        self._kubelet = Kubelet(machine, pods, self._spawn)
        self._deployments = Deployments(
            api, deployments, replica_sets, pods, events=events, quotas=self._quotas, timing=timing
        )
        endpoints = EndpointSlices(api, services, pods, slices)
        self._proxy = ServiceProxy(services, slices, machine.loopback, timing.proxy_delay, self._spawn)
        for informer in informers:
            self._spawn(informer.run(), f"watch {informer.resource.plural}")
        self._spawn(events.run(), "events")
        self._spawn(self._proxy.run(), "service proxy")
        for queue in (self._kubelet.queue, self._deployments.queue, endpoints.queue):
            # Nothing is decided on half of the facts: an unlisted pod would be created again.
            self._spawn(_after(informers, queue), "controller")

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

    def allow_image(self, image: str) -> None:
        """From now on the image can be pulled again."""
        self._images.allow(image)

    def quota(self, namespace: str, pods: int | None) -> None:
        """From now on the namespace takes at most this many pods (None: any number); those it has stay."""
        self._quotas.set(namespace, pods)
        self._deployments.everything()


async def _after(informers: Iterable[Informer], queue: WorkQueue) -> None:
    for informer in informers:
        await informer.synced.wait()
    await queue.run()


def _info(pod: Pod) -> PodInfo:
    metadata, first = pod.document["metadata"], pod.containers[0]
    return PodInfo(
        namespace=metadata["namespace"],
        name=metadata["name"],
        ip=pod.ip,
        pid=first.pid,
        log=first.log,
        pids={each.record.name: each.pid for each in pod.containers if each.pid is not None},
        logs={each.record.name: each.log for each in pod.containers},
        restarts=sum(each.record.restarts for each in pod.containers),
        ready=all(each.record.ready for each in pod.containers),
        terminating="deletionTimestamp" in metadata,
    )
