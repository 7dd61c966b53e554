"""Proof that watches are alive: a watch of KVClusters that is told to end every few seconds.

A connection can be dead though nothing says so: packets are dropped without a word, or somebody on the way takes them
and passes nothing on. The kernel's probes find the first (`runtime.sockets`); this finds both. When the end that was
asked for does not come, every connection to the API server is broken, and whoever watches asks again from where it was.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from controller.kube.client import ApiError, KubeClient
from controller.kube.kinds import KVCLUSTER
from controller.kube.link import Link
from controller.objects.names import Object
from runtime.logs import event

logger = logging.getLogger(__name__)

PERIOD = 10
"""Seconds after which the API server ends the watch."""
SLACK = 3.0
"""Seconds for which it may be late."""
SHORTEST = 2.0
"""Seconds from one watch to the next at least: whatever is on the way to the server may end them all at once."""
EVERYTHING = "0"
"""The resource version before all others: what there is comes first, from the API server's memory."""
RETRY = 2.0


class Pulse:
    """Watches KVClusters in `namespace` (None: in all), and tells `seen` of what it hears: (type of event, object)."""

    def __init__(
        self,
        client: KubeClient,
        link: Link,
        seen: Callable[[str, Object], None],
        *,
        namespace: str | None,
        rng: random.Random,
    ) -> None:
        self._client = client
        self._link = link
        self._seen = seen
        self._namespace = namespace
        self._rng = rng
        self._version = EVERYTHING

    async def run(self) -> None:
        """Until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            try:
                async with asyncio.timeout(PERIOD + SLACK):
                    await self._beat()
                await asyncio.sleep(max(0.0, begun + SHORTEST - clock()))
            except TimeoutError:
                event(
                    logger, logging.WARNING, "watch_silent", why=f"nothing within {PERIOD + SLACK:g} s: connecting anew"
                )
                self._link.cut()
            except ApiError as error:
                if error.status == 410:
                    self._version = EVERYTHING
                await asyncio.sleep(RETRY * self._rng.uniform(0.5, 1.0))

    async def _beat(self) -> None:
        async for told in self._client.watch(KVCLUSTER, self._namespace, self._version, PERIOD):
            item: dict[str, Any] = told["object"]
            self._version = item["metadata"]["resourceVersion"]
            if told["type"] != "BOOKMARK":
                self._seen(told["type"], item)
