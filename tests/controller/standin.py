"""A process that behaves as a worker or a router towards its supervisor, and does nothing else.

It serves 200 on every path through the descriptors it is given, and lists its `--workers` under /workers. `STANDIN`
tells it to misbehave: `die` (exits with code 3 at once), `deaf` (ignores SIGTERM), `unready` (answers 503), `blind`
(a router that matches no worker).
"""

import json
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLIND = os.environ.get("STANDIN") == "blind"
VIEW = {
    "ready": True,
    "matching": not BLIND,
    "why_not_ready": "",
    "why_not_matching": "its block size is 32" if BLIND else "",
}


def _flags(argv: list[str]) -> dict[str, str]:
    return dict(arg.removeprefix("--").split("=", 1) for arg in argv)


def _serve(descriptor: int, workers: list[str], status: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            rows = [{"url": url, **VIEW} for url in workers]
            body = json.dumps({"pid": os.getpid(), "workers": rows}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    listener = socket.socket(fileno=descriptor)
    server = ThreadingHTTPServer(listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    threading.Thread(target=server.serve_forever, daemon=True).start()


def main() -> None:
    flags, mode = _flags(sys.argv[1:]), os.environ.get("STANDIN", "")
    sys.stdout.write(f"stand-in {os.getpid()} {mode}\n")
    if mode == "die":
        sys.exit(3)
    # Blocked in every thread, so that it waits for sigwait whichever thread the kernel would have woken.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for name in ("fd", "management-fd"):
        if name in flags:
            _serve(int(flags[name]), flags.get("workers", "").split(","), 503 if mode == "unready" else 200)
    signal.sigwait({signal.SIGUSR1 if mode == "deaf" else signal.SIGTERM})


main()
