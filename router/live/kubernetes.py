"""The routers of a KVCluster, from the EndpointSlices of their management Service. Imported only in a cluster: the
official client takes 14 MB and 0.15 s."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from router.core.worker_state import Intake
from router.discovery.endpointslices import discovered_workers, read_slice
from router.discovery.kubernetes import find_service
from router.live.peers import AddressesUnknown, PeerAddress
from runtime.kube.errors import KubeApiError
from runtime.kube.reflector import Collection
from runtime.settings import SettingsError

__all__ = ["ServiceRouters", "find_service"]

PORT = "management"
"""Name of the port in the Service."""


class ServiceRouters:
    """`find()` gives the EndpointSlices of the Service; it is called when the routers are first asked for. `pod` is the
    name of this router's own pod."""

    def __init__(self, find: Callable[[], Awaitable[Collection]], pod: str) -> None:
        self._find = find
        self._pod = pod
        self._slices: Collection | None = None
        self._finding = asyncio.Lock()

    async def addresses(self) -> Sequence[PeerAddress]:
        """Every other router. Raises `AddressesUnknown`."""
        try:
            async with self._finding:
                if self._slices is None:
                    self._slices = await self._find()
            found = await self._slices.list()
        except (KubeApiError, SettingsError) as failure:
            raise AddressesUnknown(f"their EndpointSlices cannot be read: {failure}") from None
        items = found.get("items") if isinstance(found, Mapping) else None
        slices = [read_slice(item, PORT) for item in items or () if isinstance(item, Mapping)]
        return [
            PeerAddress(url, router.pod, leaving=router.intake is not Intake.OPEN)
            for url, router in discovered_workers(slices).items()
            if router.pod != self._pod
        ]

    async def close(self) -> None:
        """Close the connection to the API server."""
        if self._slices is not None:
            await self._slices.close()
