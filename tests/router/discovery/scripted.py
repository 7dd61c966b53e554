"""A small API server on a real socket that answers lists and watches as a test scripts it."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson

from tests.router.fakes import Connection, FakeWorker, Received
from tests.runtime.kube.objects import event, listing, status


@dataclass
class ScriptedApi(FakeWorker):
    """The EndpointSlices of one Service, with their history."""

    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    compacted: int = 0
    refusals: list[tuple[int, object, str]] = field(default_factory=list)
    """Answers (status, body, further headers) to the next requests, whatever they ask."""
    lists: int = 0
    questions: list[dict[str, str]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    tls: ssl.SSLContext | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def put(self, made: dict[str, Any], *, told: bool = True) -> None:
        """Create or replace a slice; `told=False`: the watches that are open are not told."""
        kind = "MODIFIED" if made["metadata"]["name"] in self.slices else "ADDED"
        self.slices[made["metadata"]["name"]] = made
        await self._record(event(kind, made, len(self.log) + 1), told)

    async def delete(self, name: str, *, told: bool = True) -> None:
        await self._record(event("DELETED", self.slices.pop(name), len(self.log) + 1), told)

    async def _record(self, found: dict[str, Any], told: bool) -> None:
        self.log.append(found)
        if told:
            await self.say(found)

    async def say(self, found: object) -> None:
        """Send one event to every open watch."""
        await self.say_bytes(orjson.dumps(found) + b"\n")

    async def say_bytes(self, data: bytes) -> None:
        for watch in self.feeds:
            await watch.chunk(data)

    async def end_watches(self) -> None:
        """End every watch as the server does when its time is over."""
        for watch in self.feeds:
            await watch.end_stream()
        self.feeds.clear()

    def kubeconfig(self, path: Path, namespace: str | None = "ns") -> Path:
        context: dict[str, Any] = {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})
        made = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "x", "context": context}],
            "current-context": "x",
        }
        path.write_bytes(orjson.dumps(made))
        return path

    async def _dispatch(self, connection: Connection, request: Received) -> None:
        parts = urlsplit(request.target)
        question = {name: values[0] for name, values in parse_qs(parts.query).items()} | {"path": parts.path}
        self.questions.append(question)
        self.tokens.append(request.header("authorization"))
        if self.refusals:
            code, body, extra = self.refusals.pop(0)
            await connection.answer(code, orjson.dumps(body), extra=extra)
        elif question.get("watch") != "true":
            self.lists += 1
            await connection.answer(200, orjson.dumps(listing(*self.slices.values(), version=len(self.log))))
        elif int(question["resourceVersion"]) < self.compacted:
            await connection.answer(410, orjson.dumps(status(410, "Expired", "too old resource version")))
        else:
            await connection.begin_stream()
            self.feeds.append(connection)
            for found in self.log[int(question["resourceVersion"]) :]:
                await connection.chunk(orjson.dumps(found) + b"\n")
            await connection.closed()
