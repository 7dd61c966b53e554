"""Requests to the API server: a narrow face of the official client, with typed errors and a count of writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Self

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration

from controller.kube.kinds import Kind, kind_of
from controller.kube.link import Link, LinkedClient
from controller.objects.names import FIELD_MANAGER, Object

TIMEOUT = 10.0
CONNECT_TIMEOUT = 5.0
RETRIES = (0.1, 0.4)
"""Seconds before a request that the server was too busy for, or stumbled over, is sent again; then the caller waits."""
LONGEST_WAIT = 2.0
"""Seconds. A server that asks for more (Retry-After) is left alone, and the caller told."""
PAGE = 500

APPLY, MERGE, JSON = "application/apply-patch+yaml", "application/merge-patch+json", "application/json"


class ApiError(Exception):
    """The API server refused a request, or could not be asked (status 0). `message` is its own."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later though nothing was changed."""
        return self.status in (0, 409, 429) or (self.status >= 500 and not self.message.startswith(_ILL_TYPED))

    @property
    def lasting(self) -> bool:
        """Whether a person should know though it may pass: something within the server fails, a webhook say."""
        return self.status == INTERNAL or not self.passing


INTERNAL = 500
_ILL_TYPED = "failed to create typed patch object"
"""A manifest that does not fit its kind's schema is an error of the server's own to server-side apply."""


class KubeClient:
    """One connection pool to one API server. `wrote` is called with (verb, kind) for each request that writes."""

    def __init__(
        self, configuration: Configuration, link: Link, wrote: Callable[[str, str], None] = lambda verb, kind: None
    ) -> None:
        self._configuration = configuration
        self._link = link
        self._wrote = wrote

    async def __aenter__(self) -> Self:
        self._configuration.retries = None  # whether and when to try again is the queue's to say
        self._api = ApiClient(self._configuration)
        self._api.rest_client = LinkedClient(self._configuration, self._link)
        self._api.user_agent = "kvcluster-controller"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._api.close()  # type: ignore[no-untyped-call]

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The object; None where there is none. Raises `ApiError`."""
        try:
            return await self._request("GET", kind.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str | None, selector: str = "") -> tuple[list[Object], str]:
        """All objects, asked for page by page, and the version of that list. Raises `ApiError`."""
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

    async def watch(self, kind: Kind, namespace: str | None, version: str, seconds: int) -> AsyncIterator[Object]:
        """The events after `version` ("0": what there is, then its changes), bookmarks too, until the server ends the
        watch after `seconds`. Raises `ApiError`; whoever does not want to wait for ever sets a time limit."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
        try:
            rest = await self._call("GET", kind.path(namespace), query, None, JSON, timeout)
            response: aiohttp.ClientResponse = rest.response
            try:
                if response.status != 200:
                    _answer(response.status, await response.read(), response.headers)
                async for line in response.content:
                    event = _parsed(line)
                    if event.get("type") == "ERROR":
                        status = event.get("object") or {}
                        raise ApiError(
                            int(status.get("code") or 500), str(status.get("reason")), str(status.get("message"))
                        )
                    yield event
            finally:
                response.close()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError(0, "Unreachable", f"the watch broke off: {error!r}") from None

    async def exists(self, kind: Kind) -> bool:
        """Whether the API server knows this kind. Raises `ApiError`."""
        try:
            resources = await self._request("GET", kind.api)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return any(resource["name"] == kind.plural for resource in resources.get("resources", []))

    async def apply(self, manifest: Object, manager: str = FIELD_MANAGER, subresource: str = "") -> Object:
        """Server-side apply (KEP-555): we decide the fields we state, whoever set them last. Raises `ApiError`."""
        kind, metadata = kind_of(manifest), manifest["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"], subresource)
        self._wrote("apply", kind.name)
        return await self._request("PATCH", path, {"fieldManager": manager, "force": "true"}, manifest, APPLY)

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Object:
        """JSON merge patch. Raises `ApiError`."""
        self._wrote("patch", kind.name)
        return await self._request(
            "PATCH", kind.path(namespace, name), {"fieldManager": FIELD_MANAGER}, dict(patch), MERGE
        )

    async def create(self, path: str, manifest: Object) -> Object:
        """POST of a new object. Raises `ApiError`."""
        self._wrote("create", manifest["kind"])
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
        self._wrote("delete", kind.name)
        try:
            await self._request("DELETE", kind.path(metadata["namespace"], metadata["name"]), {}, body, JSON)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = JSON,
    ) -> Object:
        for wait in RETRIES:
            try:
                return await self._send(method, path, query, body, content_type)
            except ApiError as error:
                asked = error.retry_after or 0.0
                # What failed within the server may have been done all the same: only what can be done twice is.
                again = error.status == 429 or (error.status >= 500 and error.passing and method != "POST")
                if not again or asked > LONGEST_WAIT:
                    raise
                await asyncio.sleep(max(wait, asked))
        return await self._send(method, path, query, body, content_type)

    async def _send(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Object | None, content_type: str
    ) -> Object:
        try:
            response = await self._call(method, path, query, body, content_type, aiohttp.ClientTimeout(total=TIMEOUT))
            data = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ApiError(0, "Unreachable", f"the API server cannot be reached: {error!r}") from None
        return _answer(response.status, data, response.headers)

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> Any:
        # Anew each time: a service account's token is replaced every hour.
        request = await self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": JSON, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        return await self._api.call_api(*request, _request_timeout=timeout)


def _parsed(line: bytes) -> Object:
    event = json.loads(line)
    if type(event) is not dict:
        raise ValueError("an event is no object")
    return event


def _answer(status: int, data: bytes, headers: Mapping[str, str]) -> Object:
    try:
        content = json.loads(data) if data else {}
    except ValueError:
        content = {"message": data[:200].decode(errors="replace")}
    if 200 <= status < 300:
        answered: Object = content
        return answered
    wait = headers.get("Retry-After", "")
    raise ApiError(
        status,
        str(content.get("reason") or "Unknown"),
        str(content.get("message") or "no message"),
        float(wait) if wait.isdigit() else None,
    )
