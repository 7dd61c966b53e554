"""Asking a router for its report over HTTP: answers in many pieces, and answers that are too large.

Not covered: what is in a report (tests/controller/status/test_report).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from controller.reconcile import reports
from controller.reconcile.reports import MAX_BYTES, ReportCollector
from controller.status.observed import RouterReports

REPORT = {"strategy": "cache_aware", "workers": {"known": 1, "ready": 1, "matching": 1}}


def pod(name: str = "rag-router-1") -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": "router"}
    return {"metadata": {"name": name, "labels": labels}, "status": {"podIP": "127.0.0.1"}}


def report(recent: int) -> bytes:
    decision = {"age_seconds": 1.0, "worker_id": "rag-worker-" + "x" * 200, "reason": "prefix_match"}
    return orjson.dumps({**REPORT, "recent": [decision] * recent})


@contextlib.asynccontextmanager
async def router(pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A router whose answer to anything arrives in these pieces, each once the one before has been read."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": str(sum(map(len, pieces)))})
        await response.prepare(request)
        with contextlib.suppress(OSError):
            for piece in pieces:
                await response.write(piece)
                for _ in range(20):  # the other side of the socket gets its turns
                    await asyncio.sleep(0)
        return response

    app = web.Application()
    app.router.add_get("/status", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    monkeypatch.setattr(reports, "MANAGEMENT_PORT", runner.addresses[0][1])
    try:
        yield
    finally:
        await runner.cleanup()


async def ask() -> RouterReports:
    async with aiohttp.ClientSession() as session:
        return await ReportCollector(session).collect([pod()])


async def test_an_answer_in_many_pieces_is_read_to_its_end(monkeypatch):
    body = report(recent=150)
    assert len(body) > 35_000
    async with router([body[start : start + 1_000] for start in range(0, len(body), 1_000)], monkeypatch):
        answers = await ask()
    assert answers.errors == {}
    assert len(answers.reports["rag-router-1"].recent) == 150


async def test_an_answer_that_is_too_large_is_said_to_be(monkeypatch):
    async with router([b" " * 65_536] * (MAX_BYTES // 65_536 + 1), monkeypatch):
        assert await ask() == RouterReports(errors={"rag-router-1": "its report takes more than 1,048,576 bytes"})
