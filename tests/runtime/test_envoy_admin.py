"""What is made of reports of an Envoy's administration interface, over a Unix socket that answers what a test gives it.

The form of the reports is that of Envoy 1.40, which tests/envoy/test_data_plane.py asks. Not covered: what Envoy does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runtime.envoy_admin import EnvoyAdmin

STATS = b'{"stats":[{"name":"http.clients.downstream_rq_active","value":3}]}'
NO_REPORTS = [
    pytest.param(b"no healthy upstream", id="no JSON"),
    pytest.param(b"", id="nothing"),
    pytest.param(b"\xff\xfe", id="no text"),
    pytest.param(b"[]", id="a list"),
    pytest.param(b"{}", id="no entries"),
    pytest.param(b'{"stats":[{"value":1},7],"cluster_statuses":[7]}', id="other entries"),
    pytest.param(
        b'{"stats":[{"name":"http.clients.downstream_rq_active","value":"many"}],'
        b'"cluster_statuses":[{"name":"workers","host_statuses":[{"address":{"pipe":{"path":"/s"}}}]}]}',
        id="other values",
    ),
    pytest.param(
        b'{"stats":[{"name":"http.clients.downstream_rq_active","value":null}],'
        b'"cluster_statuses":[{"name":"workers","host_statuses":[{"address":{"socket_address":{"port_value":1}}}]}]}',
        id="missing values",
    ),
]


@asynccontextmanager
async def answering(folder: Path, body: bytes) -> AsyncIterator[EnvoyAdmin]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    loop = asyncio.get_running_loop()
    server = await asyncio.start_unix_server(serve, folder / "s")
    admin = EnvoyAdmin(folder / "s", loop.time)
    try:
        yield admin
    finally:
        await admin.close()
        server.close()


@pytest.mark.parametrize("body", NO_REPORTS)
async def test_what_is_no_report_counts_as_no_answer_and_is_logged(
    tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with answering(tmp_path, body) as admin:
        assert await admin.active() == 0
        assert "envoy_admin_unreadable" in caplog.text
        caplog.clear()
        assert await admin.knows(["10.0.0.1:8000"])
        assert "envoy_admin_unreadable" in caplog.text
        await admin.idle(600.0)
        await admin.drain()
        assert await admin.healthy("workers") == 0


async def test_a_report_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with answering(tmp_path, STATS) as admin:
        assert await admin.active() == 3
        assert await admin.healthy("workers") == 0
    assert "envoy_admin_unreadable" not in caplog.text
