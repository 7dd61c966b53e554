"""What the pod of `helm test` runs.

Not covered: the pod around it, which the chart's tests render (test_chart.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.helm.docs import CHART

pytestmark = pytest.mark.process

DISCOVERY = "/apis/kvcluster.dev/v1alpha1"
SERVED = {"resources": [{"name": "kvclusters"}, {"name": "kvclusters/status"}]}


@contextmanager
def serving(answers: dict[str, object]) -> Iterator[str]:
    """A server that has these documents, for those with the token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.path == "/healthz" or self.headers["authorization"] == "Bearer secret"
            found = answers.get(self.path) if allowed else None
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *_: object) -> None:
            """Tests have no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def check(answers: dict[str, object], folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "token").write_text("secret")
    script = (CHART / "files" / "check.py").read_text(encoding="utf-8")
    with serving(answers) as url:
        command = [sys.executable, "-c", script, url, url, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_served_crd_and_a_live_controller(tmp_path: Path) -> None:
    ended = check({DISCOVERY: SERVED, "/healthz": {}}, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "the API server serves kvclusters.kvcluster.dev/v1alpha1",
        "the controller is alive",
    ]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"/healthz": {}}, DISCOVERY),
        ({DISCOVERY: {"resources": []}, "/healthz": {}}, "no kvclusters"),
        ({DISCOVERY: SERVED}, "/healthz"),
    ],
)
def test_what_is_missing_is_named(answers: dict[str, object], why: str, tmp_path: Path) -> None:
    ended = check(answers, tmp_path)
    assert ended.returncode == 1
    assert why in ended.stderr
