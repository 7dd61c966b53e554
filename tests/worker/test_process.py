"""`python -m worker.main` as its supervisor sees it: start, memory, an idle CPU, draining, and invalid settings.

Not covered: what it answers (the other modules), and the push to routers (`feed/test_push.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.sockets import listen

pytestmark = pytest.mark.process

RSS_LIMIT = 150 * 2**20


class Process:
    def __init__(self, *argv: str, pass_fds: tuple[int, ...] = (), **env: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "worker.main", *argv],
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
            env={**os.environ, **env},
        )
        self.port = 0
        self.connections: list[http.client.HTTPConnection] = []

    def line(self, event: str) -> str:
        """Wait for the log line of this event."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if f" {event} " in line:
                return line
        raise AssertionError(f"the worker ended without logging {event}")

    def ready(self) -> None:
        port = re.search(r" port=(\d+) ", self.line("worker_started"))
        assert port is not None
        self.port = int(port[1])

    def open(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        self.connections.append(connection)
        connection.request("GET" if data is None else "POST", path, data, {"content-type": "application/json"})
        return connection.getresponse()

    def resident(self) -> int:
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(20)


@contextlib.contextmanager
def running(*argv: str, **options: Any) -> Iterator[Process]:
    process = Process("--host", "127.0.0.1", "--port", "0", *argv, **options)
    try:
        yield process
    finally:
        for connection in process.connections:
            connection.close()
        process.popen.kill()
        process.popen.wait()
        assert process.popen.stderr is not None
        process.popen.stderr.close()


def test_it_starts_serves_and_drains() -> None:
    with running("--speed", "5") as worker:
        worker.ready()
        assert worker.open("/health").status == 200
        assert worker.resident() < RSS_LIMIT
        body = {"prompt": "Once upon a time", "max_tokens": 300, "stream": True, "ignore_eos": True}
        answer = worker.open("/v1/completions", body)
        first = answer.readline()
        assert first.startswith(b"data: {")
        worker.popen.send_signal(signal.SIGTERM)
        rest = answer.read()  # the stream is finished, not cut
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert "finished=True" in worker.line("worker_stopped")
        assert worker.popen.wait(10) == 0


def test_the_grace_period_ends_what_takes_too_long() -> None:
    with running("--grace-period", "0.2") as worker:
        worker.ready()
        body = {"prompt": "Once upon a time", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        answer = worker.open("/v1/completions", body)
        answer.readline()
        worker.popen.send_signal(signal.SIGTERM)
        assert b'"finish_reason":"abort"' in answer.read()
        assert worker.popen.wait(10) == 0


def test_it_takes_over_a_listening_socket() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with running("--fd", str(sock.fileno()), pass_fds=(sock.fileno(),)) as worker:
        worker.port = port
        assert worker.open("/version").read() == b'{"version":"0.32.0"}'  # the connection waited for the process
        worker.ready()
        assert worker.port == port
        assert worker.stop() == 0
    sock.close()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        pytest.param(
            ["--blocks", "10", "--max-model-len", "4096"],
            "--max-model-len 160 or less, or --blocks 256 or more",
            id="context larger than the cache",
        ),
        pytest.param(["--tokenizer", "/nonexistent"], "/nonexistent", id="no tokenizer"),
        pytest.param(["--speed", "fast"], "--speed", id="speed as text"),
    ],
)
def test_settings_that_cannot_be_served_end_it_with_one_line(argv, complaint) -> None:
    with running(*argv) as worker:
        _, said = worker.popen.communicate(timeout=20)
        assert worker.popen.returncode == 2
        assert said.startswith("worker: ")
        assert complaint in said
        assert "Traceback" not in said
