"""Which optional kinds the API server knows: asked when one is wanted, and again from time to time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from controller.kube.client import KubeClient
from controller.kube.kinds import Kind

AGE = 60.0
"""Seconds for which an answer counts: a CRD that is installed later is noticed within this time."""


class OptionalApis:
    """Answers, as old as `AGE` at most."""

    def __init__(self, client: KubeClient, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._known: dict[Kind, tuple[float, bool]] = {}

    async def absent(self, kinds: Iterable[Kind]) -> set[Kind]:
        """Those that do not exist here. Raises `ApiError`."""
        return {kind for kind in kinds if kind.optional and not await self._exists(kind)}

    async def _exists(self, kind: Kind) -> bool:
        asked_at, exists = self._known.get(kind, (float("-inf"), False))
        if self._clock() - asked_at > AGE:
            exists = await self._client.exists(kind)
            self._known[kind] = (self._clock(), exists)
        return exists
