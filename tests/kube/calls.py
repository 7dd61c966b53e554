"""Calls of the Kubernetes API, in plain HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson

Object = dict[str, Any]

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY = "application/apply-patch+yaml"


def ok(answer: httpx.Response, status: int = 200) -> Object:
    """The body of an answer that has this status."""
    assert answer.status_code == status, f"{answer.status_code}: {answer.text}"
    body: Object = answer.json()
    return body


def refused(answer: httpx.Response, status: int, reason: str) -> Object:
    """The `Status` of an answer that is a failure."""
    body = ok(answer, status)
    assert body["kind"] == "Status"
    assert body["reason"] == reason
    assert body["code"] == status
    return body


def fields(status: Object) -> set[str]:
    """The fields a failure names."""
    return {cause["field"] for cause in status["details"]["causes"]}


async def patch(client: httpx.AsyncClient, path: str, body: Any, kind: str = MERGE, **query: str) -> httpx.Response:
    return await client.patch(path, content=orjson.dumps(body), headers={"Content-Type": kind}, params=query)


async def apply(
    client: httpx.AsyncClient, path: str, body: Object, manager: str = "me", *, force: bool = False
) -> httpx.Response:
    """Server-side apply."""
    query = {"fieldManager": manager, "force": "true" if force else "false"}
    return await patch(client, path, body, APPLY, **query)


class Events:
    """The events of a watch, one by one."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()

    async def next(self, seconds: float = 20.0) -> tuple[str, Object]:
        """The type and object of the next event. Raises `StopAsyncIteration` where the server ended the watch."""
        async with asyncio.timeout(seconds):
            event = orjson.loads(await anext(self._lines))
        return event["type"], event["object"]

    async def next_names(self, count: int) -> list[tuple[str, str]]:
        """The types and objects' names of the next events."""
        found = [await self.next() for _ in range(count)]
        return [(kind, obj["metadata"].get("name", "")) for kind, obj in found]


@asynccontextmanager
async def watching(client: httpx.AsyncClient, path: str, **query: str) -> AsyncIterator[Events]:
    async with client.stream("GET", path, params={"watch": "1", **query}) as answer:
        assert answer.status_code == 200, await answer.aread()
        yield Events(answer)
