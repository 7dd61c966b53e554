"""The operator: kopf's watches fill the inventory and the work queue of KVClusters to reconcile.

It is level-triggered: whatever an event says, the KVCluster that it concerns is soon reconciled as a whole. kopf's
handlers of changes (create, update, resume) are not used: they keep their progress in annotations and finalizers of
the object, which a KVCluster whose objects all have owner references does not need (docs/decisions/011).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import kopf

from controller.kube.client import KubeClient
from controller.kube.connections import ApiServerConnections, Operation
from controller.kube.kinds import KVCLUSTER, OWNED, POD, Kind
from controller.kube.liveness import WatchLiveness
from controller.metrics import Metrics, ReconcileOutcome
from controller.objects.names import APP, MANAGED_BY, MANAGED_BY_LABEL, NAME_LABEL, Object
from controller.reconcile.inventory import Inventory, Key, owner_of
from controller.reconcile.queue import RetryLater, WorkQueue
from controller.reconcile.reconciler import Reconciler
from runtime.backoff import Backoff
from runtime.kube.errors import KubeApiError
from runtime.logs import EventLogger

logger = EventLogger(__name__)

OUR_OBJECTS = f"{NAME_LABEL}={APP},{MANAGED_BY_LABEL}={MANAGED_BY}"
DEBOUNCE = 0.05
"""Seconds from an event to the reconciliation: our own writes come back as events, several at once."""
RELIST = 600.0
"""Seconds between two full lists, which make up for events that a watch lost; spread at random over a tenth of it."""
WATCHES_RETURN = 10.0
"""Seconds after which every watch has begun anew once the API server answers again: twice the longest wait of kopf."""
RELIST_BACKOFF = Backoff(0.5, 10.0)
REQUEST_BACKOFF = Backoff(0.2, 5.0)
"""Of kopf's requests, without an end: an operator that gives up the API server has nothing left to do."""

WATCHED = (KVCLUSTER, POD, *OWNED)

Scope = tuple[Kind, str | None]
"""A kind in one namespace, or in all of them (None)."""


class Operator:
    """What happens between an event and the reconciliation of a KVCluster."""

    def __init__(
        self,
        client: KubeClient,
        connections: ApiServerConnections,
        inventory: Inventory,
        reconciler: Reconciler,
        metrics: Metrics,
        *,
        namespaces: tuple[str, ...],
        workers: int,
        rng: random.Random,
    ) -> None:
        self._client = client
        self.connections = connections
        self._inventory = inventory
        self._reconciler = reconciler
        self._metrics = metrics
        self.clusterwide = not namespaces
        """Whether it watches all namespaces."""
        self._scopes = [(kind, namespace) for kind in WATCHED for namespace in namespaces or (None,)]
        self._rng = rng
        self._watch_liveness = WatchLiveness(
            client,
            connections,
            functools.partial(self.on_event, KVCLUSTER),
            namespace=next(iter(namespaces), None),
            rng=rng,
            failed=functools.partial(metrics.request_failed, Operation.WATCH),
        )
        self.queue = WorkQueue(self._reconcile, workers=workers, rng=rng)
        self._tasks: list[asyncio.Task[None]] = []

    def on_event(self, kind: Kind, change: str | None, item: Object) -> None:
        """An event of a watch. `change` is ADDED, MODIFIED or DELETED, or None for an object that existed before."""
        item = {"apiVersion": kind.api_version, "kind": kind.name, **item}
        held = self._inventory.get(kind, (item["metadata"]["namespace"], item["metadata"]["name"]))
        update = self._inventory.drop if change == "DELETED" else self._inventory.put
        if update(kind, item):
            self._enqueue(_cluster_of(kind, item))
            if held is not None:
                self._enqueue(_cluster_of(kind, held))  # another cluster, when someone changed the label

    async def start(self) -> None:
        """Lists everything, retrying what cannot be listed, then begins to reconcile."""
        unlisted, failures = await self._relist(self._scopes), 1
        while unlisted:
            await asyncio.sleep(RELIST_BACKOFF.delay(failures))
            unlisted, failures = await self._relist(unlisted), failures + 1
        self._tasks = [
            asyncio.create_task(self.queue.run(), name="queue"),
            asyncio.create_task(self._keep_relisting(), name="relist"),
            asyncio.create_task(self._watch_liveness.run(), name="watch liveness"),
        ]

    def check(self) -> None:
        """Raises `RuntimeError` when one of its tasks has ended, so that the process no longer does its work."""
        for task in self._tasks:
            if task.done():
                why = "it was cancelled" if task.cancelled() else repr(task.exception())
                raise RuntimeError(f"the task {task.get_name()} has ended: {why}")

    async def stop(self) -> None:
        """Ends the tasks; objects in the cluster stay as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _enqueue(self, key: Key | None) -> None:
        if key is not None:
            self.queue.add(key, DEBOUNCE)

    async def _reconcile(self, key: Key) -> float | None:
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            again = await self._reconciler.reconcile(key)
        except RetryLater:
            self._metrics.reconciled(ReconcileOutcome.RETRY, clock() - begun)
            raise
        except Exception:
            self._metrics.reconciled(ReconcileOutcome.ERROR, clock() - begun)
            raise
        self._metrics.reconciled(ReconcileOutcome.DONE, clock() - begun)
        # Spread, so that clusters that were created together are not polled together for ever.
        return None if again is None else again * self._rng.uniform(0.9, 1.1)

    async def _keep_relisting(self) -> None:
        """Lists everything from time to time, and twice after an outage of the API server.

        A watch that kopf begins anew starts from a list, which does not tell what was deleted meanwhile. The first
        list makes up for the outage, the second one for the time until the last watch was back.
        """
        restored = self.connections.restored
        while True:
            try:
                async with asyncio.timeout(RELIST * self._rng.uniform(0.95, 1.05)):
                    await restored.wait()
            except TimeoutError:
                pass
            else:
                restored.clear()
                await self._relist(self._scopes)
                await asyncio.sleep(WATCHES_RETURN)
            await self._relist(self._scopes)

    async def _relist(self, scopes: Iterable[Scope]) -> list[Scope]:
        """Lists these scopes and enqueues the clusters that changed. Returns the scopes that could not be listed."""
        unlisted = []
        for kind, namespace in scopes:
            try:
                news = await self._list(kind, namespace)
            except KubeApiError as error:
                # The loss of the API server itself is logged once for all requests (controller.kube.connections).
                level = logging.WARNING if error.status else logging.DEBUG
                logger.log(level, "list_failed", kind=kind.name, why=str(error))
                unlisted.append((kind, namespace))
                continue
            self._metrics.healed.inc(len(news) if self._tasks else 0)
            for key in news:
                self._enqueue(key)
        return unlisted

    async def _list(self, kind: Kind, namespace: str | None) -> set[Key]:
        try:
            items, version = await self._client.list(kind, namespace, "" if kind == KVCLUSTER else OUR_OBJECTS)
        except KubeApiError as error:
            if kind.optional and error.status in (403, 404):
                return set()
            raise
        return self._inventory.replace(kind, namespace, items, version)


def _cluster_of(kind: Kind, item: Object) -> Key | None:
    if kind == KVCLUSTER:
        return item["metadata"]["namespace"], item["metadata"]["name"]
    return owner_of(item)


def registry(operator: Operator, stop: asyncio.Event, server: str | None = None) -> kopf.OperatorRegistry:
    """kopf's handlers for this operator.

    `stop` is the flag on which kopf stops. `server` is the URL of the API server that the pod's service account is for;
    without it, server and credentials come from the kubeconfig.
    """
    handlers = kopf.OperatorRegistry()

    @kopf.on.startup(registry=handlers)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        _configure(settings, clusterwide=operator.clusterwide)
        await operator.start()

    @kopf.on.cleanup(registry=handlers)
    async def cleanup(**_: Any) -> None:
        await operator.stop()
        stop.set()  # a task that still waits for it would keep kopf from ending for 5 s after a signal

    @kopf.on.login(registry=handlers)
    async def login(**arguments: Any) -> kopf.AiohttpSession | None:
        # kopf reads the files itself, and reads them again when the token has expired.
        found = kopf.login_with_kubeconfig(**arguments) if server is None else _account(server, **arguments)
        return None if found is None else operator.connections.session(found)

    for kind in WATCHED:
        kopf.on.event(kind.group, kind.version, kind.plural, registry=handlers, id=f"event-{kind.plural}")(
            _handler(operator, kind)
        )
    return handlers


def _account(server: str, **arguments: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, at the address in the pod's environment: kopf would use a name, which needs DNS."""
    account = kopf.login_with_service_account(**arguments)
    return None if account is None else dataclasses.replace(account, server=server)


def _handler(operator: Operator, kind: Kind) -> Callable[..., Any]:
    async def on_event(event: Any, **_: Any) -> None:
        operator.on_event(kind, event["type"], dict(event["object"]))

    return on_event


def _configure(settings: kopf.OperatorSettings, *, clusterwide: bool) -> None:
    """Sets those of kopf's settings that matter here. Times in seconds."""
    # A controller that is confined to some namespaces may have no right to list namespaces and CRDs.
    settings.scanning.disabled = not clusterwide
    for kind in (POD, *OWNED):
        settings.watching.label_selectors[kind.group, kind.version, kind.plural] = OUR_OBJECTS
    # `WatchLiveness` finds a connection that is dead without a word. The API server's bookmarks, one a minute, show
    # what it cannot see: one watch that alone is dead.
    settings.watching.server_timeout = 600
    settings.watching.client_timeout = 630
    settings.watching.inactivity_timeout = 130
    settings.watching.connect_timeout = 5
    settings.networking.request_timeout = 10
    settings.networking.error_backoffs = REQUEST_BACKOFF
    # Our own events report transitions; kopf's would repeat its log lines.
    settings.posting.enabled = False
    settings.peering.standalone = True
