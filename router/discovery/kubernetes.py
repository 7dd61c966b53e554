"""Workers from the EndpointSlices of a Service. docs/router.md, "Discovery".

Imported only where Kubernetes is the source of workers: the official client takes 14 MB and 0.15 s.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorkers
from router.discovery.endpointslices import discovered_workers, read_slice
from router.discovery.list_state import WatchedList
from router.discovery.sources import DiscoveryStatus
from runtime.kube.client import ApiServer, parse_json
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import ApiFailureCause, KubeApiError, NoClusterError
from runtime.kube.listwatch import ListWatchPolicy, Watch
from runtime.kube.reflector import Collection, EventStream, Reflector
from runtime.logs import EventLogger
from runtime.settings import SettingsError

logger = EventLogger(__name__)

ANSWER_TIMEOUT = 15.0
"""Seconds for a list, and for a watch to begin."""


class SlicesOfService(Collection, Protocol):
    """What `KubernetesDiscovery` asks for: the EndpointSlices of one Service (`ServiceSlices`)."""

    @property
    def namespace(self) -> str: ...

    @property
    def service(self) -> str: ...


class KubernetesDiscovery:
    """Lists, then watches, for ever. Owns the connection to the API server."""

    def __init__(
        self,
        slices: SlicesOfService,
        *,
        policy: ListWatchPolicy | None = None,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._where = {"service": slices.service, "namespace": slices.namespace}
        self._clock = clock
        self._list = WatchedList(self._where, clock)
        self._reflector = Reflector(
            slices,
            read_slice,
            policy=policy,
            chance=chance,
            clock=clock,
            on_failure=self._failed,
            on_settled=self._list.settled,
        )
        self._workers: DiscoveredWorkers | None = None

    def status(self) -> DiscoveryStatus:
        state, now = self._reflector.state, self._clock()
        return DiscoveryStatus(
            "kubernetes",
            known=state.objects is not None,
            healthy=state.healthy(now),
            age=state.age(now),
            error=str(state.failure or ""),
            failures=state.failures,
            relists=state.relists,
        )

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        """The workers, again whenever they change. Ends only with its task."""
        async with contextlib.aclosing(self._reflector.follow()) as following:
            async for slices in following:
                workers = discovered_workers(slices.values())
                if workers != self._workers:
                    self._log_workers(workers, first=self._workers is None)
                    self._workers = workers
                    yield workers

    def _failed(self, failure: KubeApiError) -> None:
        self._list.failed(failure, self._reflector.state, None if self._workers is None else len(self._workers))

    def _log_workers(self, workers: DiscoveredWorkers, *, first: bool) -> None:
        serving = sum(worker.intake is Intake.OPEN for worker in workers.values())
        if first:
            logger.info("workers_listed", workers=len(workers), serving=serving, **self._where)
        if not workers:
            why = "no EndpointSlice names a worker: is there a Service of this name, and has it pods?"
            logger.warning("no_workers_listed", why=why, **self._where)


class ServiceSlices:
    """The EndpointSlices of one Service, at an API server that they own."""

    def __init__(self, server: ApiServer, namespace: str, service: str) -> None:
        self.namespace = namespace
        self.service = service
        self._server = server
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._query = {"labelSelector": f"kubernetes.io/service-name={service}"}

    async def list(self) -> object:
        """The answer to a list. Raises `KubeApiError`."""
        try:
            return parse_json(await self._server.request("GET", self._path, self._query))
        except KubeApiError as error:
            raise self._with_remedy(error) from None

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        """Open a watch that fails if it outlasts its time by `slack` seconds. Raises `KubeApiError`."""
        try:
            return await self._server.watch(self._path, watch, slack, self._query)
        except KubeApiError as error:
            raise self._with_remedy(error) from None

    async def close(self) -> None:
        """Cut every connection."""
        await self._server.close()

    def _with_remedy(self, error: KubeApiError) -> KubeApiError:
        if error.cause is not ApiFailureCause.FORBIDDEN:
            return error
        remedy = f"grant list and watch on endpointslices (discovery.k8s.io) in namespace {self.namespace}"
        return KubeApiError(error.status, error.reason, f"{error.message}; {remedy}")


class Replacement:
    """Whether another router serves behind the same Service; a router asks while it drains.

    `slices` are the EndpointSlices of the routers' own Service, `pod` is the name of this router's pod.
    """

    def __init__(self, slices: Collection, pod: str) -> None:
        self._slices = slices
        self._pod = pod

    async def serves(self) -> bool:
        """Whether another router serves, or the Service is gone, so that no requests come here any more.

        Raises `OSError` if the API server does not answer, and `PermissionError` if this router may not read the
        slices: the garbage collector deletes the Role of a deleted cluster while its routers drain, and then no other
        router will come.
        """
        try:
            found = await self._slices.list()
        except KubeApiError as failure:
            if failure.cause in (ApiFailureCause.FORBIDDEN, ApiFailureCause.UNAUTHORIZED):
                raise PermissionError(str(failure)) from None
            raise OSError(str(failure)) from None
        items = found.get("items") if isinstance(found, Mapping) else None
        routers = discovered_workers(read_slice(item) for item in _objects(items))
        others = [other for other in routers.values() if other.pod != self._pod]
        return not routers or any(other.intake is Intake.OPEN for other in others)

    async def close(self) -> None:
        """Close the connection to the API server."""
        await self._slices.close()


def _objects(items: object) -> list[Mapping[str, Any]]:
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []


async def find_service(service: str, namespace: str | None, kubeconfig: Path | None) -> ServiceSlices:
    """This Service at the API server that the kubeconfig, the pod or the user's own kubeconfig names; `namespace` None:
    that of the pod or of the kubeconfig's context. Raises `SettingsError`. To be called inside the event loop."""
    try:
        credentials = await find_credentials(kubeconfig, flag="--kubernetes-kubeconfig")
    except NoClusterError as error:
        raise SettingsError(f"--kubernetes-service: {error}") from None
    server = ApiServer(credentials, "kvcluster-router", timeout=ANSWER_TIMEOUT)
    return ServiceSlices(server, namespace or credentials.namespace, service)
