"""Whether another router serves behind the Service that this one is behind. Asked while this one drains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.core.worker_state import Intake
from router.discovery.endpointslices import discovered_workers, read_slice
from router.discovery.kubernetes import Api
from router.discovery.listwatch import ApiFailure, Cause


class Replacement:
    """Looks at the EndpointSlices of the routers' own Service. `pod`: the name of this router's pod."""

    def __init__(self, api: Api, pod: str) -> None:
        self._api = api
        self._pod = pod

    async def serves(self) -> bool:
        """Whether requests have somewhere else to go, or no way here any more (a Service that is gone).

        Raises `OSError` when the API server does not say, `PermissionError` when it is not allowed to: the garbage
        collector takes a deleted cluster's Role while its routers drain, and there will be no other router.
        """
        try:
            found = await self._api.list()
        except ApiFailure as failure:
            if failure.cause in (Cause.FORBIDDEN, Cause.UNAUTHORIZED):
                raise PermissionError(str(failure)) from None
            raise OSError(str(failure)) from None
        items = found.get("items") if isinstance(found, Mapping) else None
        routers = discovered_workers(read_slice(item) for item in _objects(items))
        others = [other for other in routers.values() if other.pod != self._pod]
        return not routers or any(other.intake is Intake.OPEN for other in others)

    async def close(self) -> None:
        """Let go of the API server."""
        await self._api.close()


def _objects(items: object) -> list[Mapping[str, Any]]:
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []
