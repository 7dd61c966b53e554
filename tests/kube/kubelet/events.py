"""Events (core/v1) about objects: each said once."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from typing import Any

from tests.kube.kubelet.client import EVENTS, TRANSIENT, Api, ApiError, Object, Resource, now

NAME_LIMIT = 240


class Events:
    """Sends events in the background; one that the API server does not take is lost, as in a cluster."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._queue: asyncio.Queue[Object] = asyncio.Queue()
        self._said: set[tuple[str, str, str]] = set()

    def say(self, resource: Resource, item: Mapping[str, Any], reason: str, message: str, *, warning: bool) -> None:
        """An event about this object, unless the very same was said before."""
        metadata = item["metadata"]
        what = (metadata["uid"], reason, message)
        if what in self._said:
            return
        self._said.add(what)
        time = now()
        event = {
            "metadata": {
                "namespace": metadata["namespace"],
                "name": f"{metadata['name'][:NAME_LIMIT]}.{secrets.token_hex(8)}",
            },
            "involvedObject": {
                "apiVersion": resource.api_version,
                "kind": resource.kind,
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message,
            "source": {"component": "fake-node"},
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
        }
        self._queue.put_nowait(event)

    async def run(self) -> None:
        """Sends until it is cancelled."""
        while True:
            event = await self._queue.get()
            with contextlib.suppress(ApiError, *TRANSIENT):
                await self._api.create(EVENTS, event)
