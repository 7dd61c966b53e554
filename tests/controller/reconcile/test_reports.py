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
from controller.reconcile.tokens import TokensUnknownError
from controller.status.observed import RouterReports

REPORT = {"strategy": "cache_aware", "workers": {"known": 1, "ready": 1, "matching": 1}}


def pod(name: str = "rag-router-1", secret: str = "") -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": "router"}
    volumes = [{"name": "kvcluster-management", "secret": {"secretName": secret}}] if secret else []
    metadata = {"name": name, "namespace": "ns", "labels": labels}
    return {"metadata": metadata, "spec": {"volumes": volumes}, "status": {"podIP": "127.0.0.1"}}


def report(recent: int) -> bytes:
    decision = {"age_seconds": 1.0, "worker_id": "rag-worker-" + "x" * 200, "reason": "prefix_match"}
    return orjson.dumps({**REPORT, "recent": [decision] * recent})


@contextlib.asynccontextmanager
async def router(pieces: list[bytes], monkeypatch: pytest.MonkeyPatch, token: str = "") -> AsyncIterator[list[str]]:
    """A router whose answer to anything arrives in these pieces, each once the one before has been read. Yields the
    tokens that it is shown; with a `token`, others are refused."""
    shown: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        shown.append(request.headers.get("x-kvcluster-token", ""))
        if token and shown[-1] != token:
            return web.Response(status=401)
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
        yield shown
    finally:
        await runner.cleanup()


class Known:
    """Tokens of the Secret `ns/tokens`: those that are known, and those that a second look finds."""

    def __init__(self, first: tuple[str, ...] = (), second: tuple[str, ...] = ()) -> None:
        self.first, self.second = first, second

    async def of(self, secret: tuple[str, str], *, refused: bool = False) -> tuple[str, ...]:
        assert secret == ("ns", "tokens")
        if not self.first:
            raise TokensUnknownError("Secret tokens cannot be read: 403")
        return self.second if refused else self.first


async def ask(tokens: Known | None = None, secret: str = "") -> RouterReports:
    async with aiohttp.ClientSession() as session:
        return await ReportCollector(session, tokens or Known()).collect([pod(secret=secret)])


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


async def test_a_router_of_an_older_release_is_shown_no_token(monkeypatch):
    async with router([report(0)], monkeypatch) as shown:
        assert (await ask()).errors == {}
    assert shown == [""]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        pytest.param(Known(("right",)), ["right"], id="right"),
        pytest.param(Known(("new", "right")), ["new", "right"], id="not yet at the router"),
        pytest.param(Known(("old",), ("right", "old")), ["old", "right"], id="just changed"),
    ],
)
async def test_each_token_that_may_be_right_is_shown(tokens: Known, shown: list[str], monkeypatch):
    async with router([report(0)], monkeypatch, "right") as seen:
        answers = await ask(tokens, "tokens")
    assert answers.errors == {}
    assert seen == shown


async def test_a_router_that_accepts_no_token_says_so(monkeypatch):
    async with router([report(0)], monkeypatch, "right") as shown:
        answers = await ask(Known(("wrong-one",), ("wrong-one",)), "tokens")
    assert "accepts no token of Secret tokens" in answers.errors["rag-router-1"]
    assert "wrong-one" not in answers.errors["rag-router-1"]
    assert set(shown) == {"wrong-one"}


async def test_tokens_that_are_not_known_are_a_reason(monkeypatch):
    async with router([report(0)], monkeypatch, "right") as shown:
        answers = await ask(Known(), "tokens")
    assert "asks for a token: Secret tokens cannot be read: 403" in answers.errors["rag-router-1"]
    assert shown == []
