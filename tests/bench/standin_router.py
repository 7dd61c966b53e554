"""A stand-in for a router that is not ours: a reverse proxy that sends requests to its workers in turn.

It models what `kvcluster compare --router` meets in one: a command with a port and worker URLs, a start that takes a
moment, answers without our headers, child processes, and output on both streams. It models nothing of any router's
policy.

    python -m tests.bench.standin_router --port PORT [--child FILE] [--deaf] WORKER...
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import subprocess
import sys
from pathlib import Path

import aiohttp
from aiohttp import web

HOP_BY_HOP = {"transfer-encoding", "content-length", "connection", "host"}


async def serve(port: int, workers: list[str]) -> None:
    """Proxy until the process ends."""
    turn = itertools.cycle(workers)

    async with aiohttp.ClientSession(auto_decompress=False) as session:

        async def forward(request: web.Request) -> web.StreamResponse:
            url = next(turn) + request.path
            asked = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
            body = await request.read()
            async with session.request(request.method, url, data=body, headers=asked) as answer:
                ours = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
                relayed = web.StreamResponse(status=answer.status, headers=ours)
                await relayed.prepare(request)
                async for piece in answer.content.iter_any():
                    await relayed.write(piece)
                return relayed

        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--child", type=Path, help="start a child process and write its pid here")
    parser.add_argument("--deaf", action="store_true", help="run, and never listen")
    parser.add_argument("workers", nargs="*")
    options = parser.parse_args()
    if options.child is not None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        options.child.write_text(str(child.pid))
    sys.stderr.write("the stand-in starts\n")
    asyncio.run(asyncio.Event().wait() if options.deaf else serve(options.port, options.workers))


if __name__ == "__main__":
    main()
