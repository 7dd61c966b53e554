"""What the controller asks of the API server, kind by kind: a typed face of `runtime.kube`, with a count of writes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from controller.kube.kinds import Kind, kind_of
from controller.objects.names import FIELD_MANAGER, Object
from runtime.backoff import Backoff
from runtime.kube.client import JSON, ApiServer, WatchStream
from runtime.kube.errors import KubeApiError
from runtime.kube.listwatch import Watch

ATTEMPTS = 3
RETRY = Backoff(0.2, 0.4)
"""Before a request that the server was too busy for, or stumbled over, is sent again; after that the caller waits."""
LONGEST_WAIT = 2.0
"""Seconds. A server that asks for more (Retry-After) is left alone, and the caller told."""
PAGE = 500
WRITTEN = "done"
"""Outcome of a write that the API server took."""

APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"


class KubeClient:
    """Requests to one API server.

    `wrote` is called with (verb, kind, outcome) for each write, after the last attempt at it. Verbs are `apply`,
    `patch`, `create` and `delete`; the outcome is `WRITTEN` or the cause of the failure.
    """

    def __init__(
        self, server: ApiServer, wrote: Callable[[str, str, str], None] = lambda verb, kind, outcome: None
    ) -> None:
        self._server = server
        self._wrote = wrote

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The object; None where there is none. Raises `KubeApiError`."""
        try:
            return await self._request("GET", kind.path(namespace, name))
        except KubeApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str | None, selector: str = "") -> tuple[list[Object], str]:
        """All objects, asked for page by page, and the version of that list. Raises `KubeApiError`."""
        items: list[Object] = []
        proceed = ""
        while True:
            query = {"limit": str(PAGE), "labelSelector": selector, "continue": proceed}
            page = await self._request("GET", kind.path(namespace), {k: v for k, v in query.items() if v})
            head = {"apiVersion": kind.api_version, "kind": kind.name}
            items += [head | item for item in page.get("items", [])]
            proceed = page["metadata"].get("continue", "")
            if not proceed:
                return items, str(page["metadata"].get("resourceVersion", ""))

    async def watch(self, kind: Kind, namespace: str | None, watch: Watch, slack: float) -> WatchStream:
        """The events after `watch.version` ("0": what there is, then its changes), bookmarks too. The watch fails when
        the server does not end it in its time and `slack` seconds more. Raises `KubeApiError`."""
        return await self._server.watch(kind.path(namespace), watch, slack)

    async def exists(self, kind: Kind) -> bool:
        """Whether the API server knows this kind. Raises `KubeApiError`."""
        try:
            resources = await self._request("GET", kind.api)
        except KubeApiError as error:
            if error.status == 404:
                return False
            raise
        return any(resource["name"] == kind.plural for resource in resources.get("resources", []))

    async def apply(self, manifest: Object, manager: str = FIELD_MANAGER, subresource: str = "") -> Object:
        """Server-side apply (KEP-555): we decide the fields we state, whoever set them last. Raises `KubeApiError`."""
        kind, metadata = kind_of(manifest), manifest["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"], subresource)
        with self._write("apply", kind.name):
            return await self._request("PATCH", path, {"fieldManager": manager, "force": "true"}, manifest, APPLY)

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Object:
        """JSON merge patch. Raises `KubeApiError`."""
        path = kind.path(namespace, name)
        with self._write("patch", kind.name):
            return await self._request("PATCH", path, {"fieldManager": FIELD_MANAGER}, dict(patch), MERGE)

    async def create(self, path: str, manifest: Object) -> Object:
        """POST of a new object. Raises `KubeApiError`."""
        with self._write("create", manifest["kind"]):
            return await self._request("POST", path, {"fieldManager": FIELD_MANAGER}, manifest, JSON)

    async def delete(self, manifest: Object) -> None:
        """Deletes exactly this object, not a later one of the same name; none is left to delete: fine."""
        kind, metadata = kind_of(manifest), manifest["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": metadata["uid"]},
            "propagationPolicy": "Background",
        }
        with self._write("delete", kind.name):
            try:
                await self._request("DELETE", kind.path(metadata["namespace"], metadata["name"]), {}, body, JSON)
            except KubeApiError as error:
                if error.status not in (404, 409):
                    raise

    @contextlib.contextmanager
    def _write(self, verb: str, kind: str) -> Iterator[None]:
        """Reports how the write within ends. Raises what it raises."""
        try:
            yield
        except KubeApiError as error:
            self._wrote(verb, kind, error.cause)
            raise
        self._wrote(verb, kind, WRITTEN)

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = JSON,
    ) -> Object:
        attempt = 1
        while True:
            try:
                return await self._server.request_object(method, path, query, body, content_type)
            except KubeApiError as error:
                asked = error.retry_after or 0.0
                # What failed within the server may have been done all the same: only what can be done twice is.
                again = error.status == 429 or (error.status >= 500 and error.passing and method != "POST")
                if not again or attempt == ATTEMPTS or asked > LONGEST_WAIT:
                    raise
                await asyncio.sleep(max(RETRY.delay(attempt), asked))
                attempt += 1
