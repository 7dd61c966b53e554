"""Serving an ASGI app on the running event loop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.server import ServerState


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    sock = socket.create_server((host, port), backlog=2048)
    sock.setblocking(False)
    # Inherited by connections; asyncio sets it itself only where the socket names its protocol.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def serve(app: Any, sock: socket.socket, state: ServerState) -> asyncio.Server:
    """Serve with uvicorn's protocol; its own `Server` takes over signals, and needs up to 0.2 s to stop."""
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, log_level="critical", access_log=False, ws="none", interface="asgi3"
    )
    config.load()

    def protocol() -> asyncio.Protocol:
        return config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]

    return await asyncio.get_running_loop().create_server(protocol, sock=sock, backlog=2048)
