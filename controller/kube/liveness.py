"""Proof that watches are alive: a watch of KVClusters that is told to end every few seconds.

A connection can be dead though nothing says so: packets are dropped without a word, or something on the way takes them
and passes nothing on. The kernel's probes find the first (`runtime.sockets`); this finds both. When the end that was
asked for does not come, every connection to the API server is broken, and every watch is begun again from where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

from controller.kube.client import KubeClient
from controller.kube.connections import ApiServerConnections
from controller.kube.kinds import KVCLUSTER
from controller.objects.names import Object
from runtime.backoff import Backoff
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch, watch_event
from runtime.logs import EventLogger

logger = EventLogger(__name__)

PERIOD = 10
"""Seconds after which the API server ends the watch."""
SLACK = 3.0
"""Seconds for which it may be late."""
SHORTEST = 2.0
"""Seconds from one watch to the next at least: whatever is on the way to the server may end them all at once."""
EVERYTHING = "0"
"""The resource version before all others: what there is comes first, from the API server's memory."""
RETRY = Backoff(2.0, 2.0)
BROKEN = frozenset(
    {ApiFailureCause.CUT, ApiFailureCause.SILENT, ApiFailureCause.ERROR_EVENT, ApiFailureCause.MALFORMED}
)
"""How a watch that had begun can fail. What keeps one from beginning is seen where all requests are."""


@dataclass(eq=False)
class WatchLiveness:
    """Watches KVClusters in `namespace` (None: in all), and tells `seen` of what comes: (type of event, object).

    `failed` is called for a watch that began and then broke off or fell silent.
    """

    client: KubeClient
    connections: ApiServerConnections
    seen: Callable[[str, Object], None]
    _: KW_ONLY
    namespace: str | None
    rng: random.Random
    failed: Callable[[ApiFailureCause], None] = lambda cause: None
    _version: str = field(default=EVERYTHING, init=False)

    async def run(self) -> None:
        """Until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            try:
                await self._watch_once()
                await asyncio.sleep(max(0.0, begun + SHORTEST - clock()))
            except KubeApiError as error:
                if error.cause in BROKEN:
                    self.failed(error.cause)
                if error.cause is ApiFailureCause.SILENT:
                    why = f"nothing within {PERIOD + SLACK:g} s: connecting anew"
                    logger.warning("watch_silent", why=why)
                    self.connections.cut()
                    continue
                if error.cause is ApiFailureCause.EXPIRED:
                    self._version = EVERYTHING
                await asyncio.sleep(RETRY.delay(1, self.rng.random()))

    async def _watch_once(self) -> None:
        stream = await self.client.watch(KVCLUSTER, self.namespace, Watch(self._version, PERIOD), SLACK)
        with contextlib.closing(stream):
            while (found := await stream.next()) is not None:
                change = watch_event(found)
                if change.kind != "BOOKMARK":
                    self.seen(change.kind, dict(change.item))
                self._version = change.version
