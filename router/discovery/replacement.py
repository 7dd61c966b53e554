"""Whether another router serves behind the same Service. A router asks while it drains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.core.worker_state import Intake
from router.discovery.endpointslices import discovered_workers, read_slice
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.reflector import Collection


class Replacement:
    """Reads the EndpointSlices of the routers' own Service. `pod`: the name of this router's pod."""

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
