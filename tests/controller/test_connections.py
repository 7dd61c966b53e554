"""All connections to the API server.

Covers: what is logged of a server that comes and goes, which answers count, and breaking connections. Not covered:
when they are broken (test_watch_liveness.py).
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import pytest
from aiohttp import web

from controller.kube.connections import ApiServerConnections, ApiServerEvent, ApiServerState, without_retry_lines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "controller.kube.connections"]


def test_one_line_when_it_goes_and_one_when_it_is_back(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    connections = ApiServerConnections(Clock())
    connections.advance(ApiServerEvent.FAILED, "refused")
    connections.advance(ApiServerEvent.ANSWERED)
    assert lines(caplog) == [], "one connection that is cut is nothing to speak of"
    for _ in range(20):
        connections.advance(ApiServerEvent.FAILED, "refused")
    assert (connections.state, lines(caplog)) == (ApiServerState.LOST, ["api_server_lost"])
    connections.advance(ApiServerEvent.REFUSED)
    assert connections.state is ApiServerState.LOST, "a server that has just started refuses everything"
    for _ in range(3):
        connections.advance(ApiServerEvent.ANSWERED)
    assert (connections.state, lines(caplog)) == (ApiServerState.ANSWERING, ["api_server_lost", "api_server_restored"])


def test_kopfs_line_for_each_request_is_dropped_while_requests_fail(caplog: pytest.LogCaptureFixture):
    connections, kopf = ApiServerConnections(Clock()), logging.getLogger("kopf.clients")
    failed = "Request attempt #1/9 failed; will retry: GET /api -> APIForbiddenError"
    with without_retry_lines(connections):
        kopf.error(failed)
        connections.advance(ApiServerEvent.FAILED, "refused")
        kopf.error(failed)
        kopf.error("something else")
        connections.advance(ApiServerEvent.ANSWERED)
    kopf.error(failed)
    said = [record.getMessage() for record in caplog.records if record.name == kopf.name]
    assert said == [failed, "something else", failed]


async def test_what_it_observes_and_cuts():
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/busy":
            return web.Response(status=503)
        if request.path == "/refused":
            return web.Response(status=403)
        if request.path == "/webhook":
            return web.Response(status=500)
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    app = web.Application()
    app.router.add_get("/{anything}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    connections = ApiServerConnections(Clock())
    connector = aiohttp.TCPConnector(socket_factory=connections.socket)
    async with aiohttp.ClientSession(
        f"http://{host}:{port}", connector=connector, middlewares=[connections.observe]
    ) as api:
        doubtful, answering = ApiServerState.DOUBTFUL, ApiServerState.ANSWERING
        steps = (
            ("/webhook", answering), ("/webhook", answering), ("/busy", doubtful), ("/webhook", doubtful),
            ("/refused", answering), ("/busy", doubtful),
        )  # fmt: skip
        for path, state in steps:
            async with api.get(path):
                assert connections.state is state
        async with api.get("/watch") as watch:
            assert connections.state is ApiServerState.ANSWERING
            connections.cut()
            with pytest.raises(aiohttp.ClientError):
                await watch.content.readany()
        async with api.get("/refused"):
            pass
        await runner.cleanup()
        for _ in range(2):
            with pytest.raises(aiohttp.ClientError):
                await api.get("/refused")
        assert connections.state is ApiServerState.LOST
