"""Run the fake API server by hand: `python -m tests.kube.apiserver --port 6443 --kubeconfig FILE`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from pathlib import Path

from tests.kube.apiserver import FakeApiServer


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kube.apiserver", description=__doc__)
    parser.add_argument("--port", type=int, default=6443)
    parser.add_argument("--kubeconfig", type=Path, default=None, help="write a kubeconfig of the administrator here")
    parser.add_argument("--user", default="admin", help="whom the kubeconfig is for")
    options = parser.parse_args()
    api = FakeApiServer(port=options.port)
    await api.start()
    if options.kubeconfig is not None:
        api.kubeconfig(options.kubeconfig, options.user)
    print(f"serving {api.url}", flush=True)  # noqa: T201
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await api.stop()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
