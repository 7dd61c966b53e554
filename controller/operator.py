"""The kopf shell: watches that fill the inventory, and the queue of KVClusters to look at.

Level-triggered: whatever an event says, the cluster it belongs to is looked at as a whole, soon. kopf's handlers of
changes (create, update, resume) are not used: they keep their progress in annotations and finalizers of the object,
which a cluster whose objects all have owner references does not need (docs/decisions/011).
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

from controller.kube.client import ApiError, KubeClient
from controller.kube.kinds import KVCLUSTER, OWNED, POD, Kind
from controller.kube.link import Link
from controller.metrics import Metrics
from controller.objects.names import APP, MANAGED_BY, MANAGED_BY_LABEL, NAME_LABEL, Object
from controller.pulse import Pulse
from controller.reconcile.inventory import Inventory, Key, owner_of
from controller.reconcile.queue import RetryLater, WorkQueue
from controller.reconcile.reconciler import Reconciler
from runtime.backoff import Backoff
from runtime.logs import event

logger = logging.getLogger(__name__)

OURS = f"{NAME_LABEL}={APP},{MANAGED_BY_LABEL}={MANAGED_BY}"
DEBOUNCE = 0.05
"""Seconds: our own writes come back as events, several at once."""
RELIST = 600.0
"""Seconds between two full lists, which heal what a watch lost. They are spread at random over a tenth of that."""
RELIST_BACKOFF = Backoff(0.5, 10.0)
REQUEST_BACKOFF = Backoff(0.2, 5.0)
"""Of kopf's requests, without an end: an operator that gives up the API server has nothing left to do."""

WATCHED = (KVCLUSTER, POD, *OWNED)

Part = tuple[Kind, str | None]
"""A kind, in one namespace or in all."""


class Operator:
    """What happens between an event and a look at a cluster."""

    def __init__(
        self,
        client: KubeClient,
        link: Link,
        inventory: Inventory,
        reconciler: Reconciler,
        metrics: Metrics,
        *,
        namespaces: tuple[str, ...],
        workers: int,
        rng: random.Random,
    ) -> None:
        self._client = client
        self.link = link
        self._inventory = inventory
        self._reconciler = reconciler
        self._metrics = metrics
        self.clusterwide = not namespaces
        """Whether all namespaces are looked after."""
        self._everything = [(kind, namespace) for kind in WATCHED for namespace in namespaces or (None,)]
        self._rng = rng
        self._pulse = Pulse(
            client, link, functools.partial(self.seen, KVCLUSTER), namespace=next(iter(namespaces), None), rng=rng
        )
        self.queue = WorkQueue(self._look, workers=workers, rng=rng)
        self._tasks: list[asyncio.Task[None]] = []

    def seen(self, kind: Kind, change: str | None, item: Object) -> None:
        """An event of a watch: `change` is ADDED, MODIFIED, DELETED, or None for what was there before."""
        item = {"apiVersion": kind.api_version, "kind": kind.name, **item}
        held = self._inventory.get(kind, (item["metadata"]["namespace"], item["metadata"]["name"]))
        take = self._inventory.drop if change == "DELETED" else self._inventory.put
        if take(kind, item):
            self._wake(_cluster(kind, item))
            if held is not None:
                self._wake(_cluster(kind, held))  # whose label somebody took away misses it

    async def start(self) -> None:
        """Learns what there is, then begins to look after it."""
        unlisted, failures = await self._relist(self._everything), 1
        while unlisted:
            await asyncio.sleep(RELIST_BACKOFF.delay(failures))
            unlisted, failures = await self._relist(unlisted), failures + 1
        self._tasks = [
            asyncio.create_task(self.queue.run(), name="queue"),
            asyncio.create_task(self._keep_relisting(), name="relist"),
            asyncio.create_task(self._pulse.run(), name="pulse"),
        ]

    def check(self) -> None:
        """Raises `RuntimeError` when it no longer looks after anything, though the process lives."""
        for task in self._tasks:
            if task.done():
                why = "it was cancelled" if task.cancelled() else repr(task.exception())
                raise RuntimeError(f"the task {task.get_name()} has ended: {why}")

    async def stop(self) -> None:
        """Leaves everything as it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _wake(self, key: Key | None) -> None:
        if key is not None:
            self.queue.add(key, DEBOUNCE)

    async def _look(self, key: Key) -> float | None:
        with self._metrics.seconds.time():
            try:
                again = await self._reconciler.reconcile(key)
            except RetryLater:
                self._metrics.reconciles.labels("again").inc()
                raise
        self._metrics.reconciles.labels("done").inc()
        # Spread, so that clusters which were made together are not polled together for ever.
        return None if again is None else again * self._rng.uniform(0.9, 1.1)

    async def _keep_relisting(self) -> None:
        while True:
            await asyncio.sleep(RELIST * self._rng.uniform(0.95, 1.05))
            await self._relist(self._everything)

    async def _relist(self, parts: Iterable[Part]) -> list[Part]:
        """Lists these, and wakes the clusters of which that brought news; those that could not be listed."""
        unlisted = []
        for kind, namespace in parts:
            try:
                news = await self._list(kind, namespace)
            except ApiError as error:
                # That the API server is away is said once, for all (controller.kube.link).
                level = logging.WARNING if error.status else logging.DEBUG
                event(logger, level, "list_failed", kind=kind.name, why=str(error))
                unlisted.append((kind, namespace))
                continue
            self._metrics.healed.inc(len(news) if self._tasks else 0)
            for key in news:
                self._wake(key)
        return unlisted

    async def _list(self, kind: Kind, namespace: str | None) -> set[Key]:
        try:
            items, version = await self._client.list(kind, namespace, "" if kind == KVCLUSTER else OURS)
        except ApiError as error:
            if kind.optional and error.status in (403, 404):
                return set()
            raise
        return self._inventory.replace(kind, namespace, items, version)


def _cluster(kind: Kind, item: Object) -> Key | None:
    if kind == KVCLUSTER:
        return item["metadata"]["namespace"], item["metadata"]["name"]
    return owner_of(item)


def registry(operator: Operator, stop: asyncio.Event, server: str | None = None) -> kopf.OperatorRegistry:
    """kopf's handlers for this operator. `stop` is the flag that kopf was told to stop by.

    `server`: URL of the API server that the pod's service account is for; without it the kubeconfig says everything.
    """
    handlers = kopf.OperatorRegistry()

    @kopf.on.startup(registry=handlers)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        _configure(settings, clusterwide=operator.clusterwide)
        await operator.start()

    @kopf.on.cleanup(registry=handlers)
    async def cleanup(**_: Any) -> None:
        await operator.stop()
        stop.set()  # whoever still waits for it keeps kopf from ending for 5 s after a signal

    @kopf.on.login(registry=handlers)
    async def login(**arguments: Any) -> kopf.AiohttpSession | None:
        # Without client libraries: kopf reads the files itself, and reads them again when the token has expired.
        found = kopf.login_with_kubeconfig(**arguments) if server is None else _account(server, **arguments)
        return None if found is None else operator.link.session(found)

    for kind in WATCHED:
        kopf.on.event(kind.group, kind.version, kind.plural, registry=handlers, id=f"seen-{kind.plural}")(
            _handler(operator, kind)
        )
    return handlers


def _account(server: str, **arguments: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, at the address that every pod is given: kopf's own is a name, which needs DNS."""
    account = kopf.login_with_service_account(**arguments)
    return None if account is None else dataclasses.replace(account, server=server)


def _handler(operator: Operator, kind: Kind) -> Callable[..., Any]:
    async def seen(event: Any, **_: Any) -> None:
        operator.seen(kind, event["type"], dict(event["object"]))

    return seen


def _configure(settings: kopf.OperatorSettings, *, clusterwide: bool) -> None:
    """What matters of kopf's settings. Times in seconds."""
    # Whoever is given a list of namespaces may have no right to list namespaces and CRDs.
    settings.scanning.disabled = not clusterwide
    for kind in (POD, *OWNED):
        settings.watching.label_selectors[kind.group, kind.version, kind.plural] = OURS
    # A connection that is dead without a word is found out by the pulse. What it cannot see, one watch that alone is
    # dead, the API server's bookmarks show: one a minute.
    settings.watching.server_timeout = 600
    settings.watching.client_timeout = 630
    settings.watching.inactivity_timeout = 130
    settings.watching.connect_timeout = 5
    settings.networking.request_timeout = 10
    settings.networking.error_backoffs = REQUEST_BACKOFF
    # Our own events tell of transitions; kopf's would tell of its log lines.
    settings.posting.enabled = False
    settings.peering.standalone = True
