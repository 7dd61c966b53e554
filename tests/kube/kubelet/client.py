"""The Kubernetes API over plain HTTP, as far as a node and its controllers speak it, and the events that they write.

Its own client, not the product's: a fault of that one would not show in a test in which both sides shared it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

Object = dict[str, Any]
Key = tuple[str, str]
"""(namespace, name)"""

MERGE_PATCH = "application/merge-patch+json"
CALL_TIMEOUT = 10.0
CONFLICT = 409
TRANSIENT = (aiohttp.ClientError, TimeoutError, ConnectionError)
"""What the lack of an API server looks like."""


NAME_LIMIT = 240


class ApiError(RuntimeError):
    """The API server refused a request."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Resource:
    """A namespaced kind of the API."""

    prefix: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        """As objects name it."""
        return self.prefix.removeprefix("/apis/").removeprefix("/api/")

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Of all objects, of those in a namespace, of one, or of a part of one."""
        path = self.prefix + (f"/namespaces/{namespace}" if namespace else "") + f"/{self.plural}"
        return path + (f"/{name}" if name else "") + (f"/{subresource}" if subresource else "")


PODS = Resource("/api/v1", "pods", "Pod")
SERVICES = Resource("/api/v1", "services", "Service")
EVENTS = Resource("/api/v1", "events", "Event")
CONFIG_MAPS = Resource("/api/v1", "configmaps", "ConfigMap")
SERVICE_ACCOUNTS = Resource("/api/v1", "serviceaccounts", "ServiceAccount")
SECRETS = Resource("/api/v1", "secrets", "Secret")
DEPLOYMENTS = Resource("/apis/apps/v1", "deployments", "Deployment")
REPLICA_SETS = Resource("/apis/apps/v1", "replicasets", "ReplicaSet")
ENDPOINT_SLICES = Resource("/apis/discovery.k8s.io/v1", "endpointslices", "EndpointSlice")


def key_of(item: Mapping[str, Any]) -> Key:
    """Namespace and name."""
    return item["metadata"]["namespace"], item["metadata"]["name"]


def now() -> str:
    """The time as the API writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Api:
    """One API server. Calls raise `ApiError` or one of `TRANSIENT`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url.rstrip("/")
        self._session = session

    async def get(self, resource: Resource, key: Key) -> Object | None:
        """The object; None when there is none."""
        with contextlib.suppress(_NotFound):
            return await self._call("GET", resource.path(*key))
        return None

    async def list(self, resource: Resource) -> Object:
        """The list of all objects in all namespaces."""
        return await self._call("GET", resource.path())

    async def create(self, resource: Resource, item: Object) -> Object:
        """The object as it was stored."""
        path = resource.path(item["metadata"]["namespace"])
        return await self._call("POST", path, {"apiVersion": resource.api_version, "kind": resource.kind, **item})

    async def bind(self, pod: Key, node: str) -> None:
        """Gives a pod to a node, as the scheduler does; by a patch, for the fake API server has no bindings."""
        await self.patch(PODS, pod, {"spec": {"nodeName": node}})

    async def patch(self, resource: Resource, key: Key, patch: Object, subresource: str | None = None) -> Object | None:
        """A merge patch: the object as it is then; None when there is none."""
        with contextlib.suppress(_NotFound):
            return await self._call("PATCH", resource.path(*key, subresource), patch, MERGE_PATCH)
        return None

    async def delete(self, resource: Resource, key: Key, **options: Any) -> Object | None:
        """What the API server answers; None when the object is not there (or is another one) already."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", **options}
        try:
            return await self._call("DELETE", resource.path(*key), body)
        except _NotFound:
            return None
        except ApiError as error:
            uid = options.get("preconditions", {}).get("uid")
            if error.code != CONFLICT or uid is None:
                raise
            found = await self.get(resource, key)
            if found is not None and found["metadata"]["uid"] == uid:
                raise
            return None

    async def _call(
        self, method: str, path: str, body: Object | None = None, content_type: str = "application/json"
    ) -> Object:
        data = None if body is None else json.dumps(body).encode()
        async with self._session.request(
            method,
            self.url + path,
            data=data,
            headers={"content-type": content_type, "accept": "application/json"},
            timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT),
        ) as response:
            text = await response.read()
            if response.status >= 400:
                raise _error(response.status, text)
            answer: Object = json.loads(text)
            return answer

    async def watch(self, resource: Resource, version: str, seconds: int) -> AsyncIterator[tuple[str, Object]]:
        """(type, object) of each event after this version, until the server ends the watch."""
        query = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        timeout = aiohttp.ClientTimeout(total=None, connect=CALL_TIMEOUT, sock_read=seconds + CALL_TIMEOUT)
        async with self._session.get(self.url + resource.path(), params=query, timeout=timeout) as response:
            if response.status >= 400:
                raise _error(response.status, await response.read())
            buffer = b""
            async for chunk in response.content.iter_any():
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in filter(bytes.strip, lines):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _error(event["object"].get("code", 500), json.dumps(event["object"]).encode())
                    yield event["type"], event["object"]


class _NotFound(ApiError):
    pass


def _error(code: int, text: bytes) -> ApiError:
    try:
        status = json.loads(text)
        reason, message = str(status.get("reason", "")), str(status.get("message", ""))
    except ValueError:
        reason, message = "", text[:200].decode(errors="replace")
    return (_NotFound if code == 404 else ApiError)(code, reason, message)


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
