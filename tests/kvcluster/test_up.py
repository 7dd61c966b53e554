"""`kvcluster up` with real workers and a real router: serving, restarting, stopping, and settings that are refused.

Not covered: the live table (test_display), and the supervision of processes one by one (tests/controller/test_cluster).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.options import TOKEN_VARIABLE, management_headers, tls_context
from tests.processes import runs

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
MANIFEST = """
apiVersion: kvcluster.dev/v1alpha1
kind: KVCluster
metadata: {name: small}
spec:
  workers: {replicas: 2, nodeSelector: {gpu: a100}}
  engine: {speed: 50}
"""
KEY = "sk-0123456789abcdef"
AUTH = {"keysSecretRef": {"name": "api-keys", "key": "keys.yaml"}}
DEADLINE = 60.0
TOKEN = "the-token-of-this-shell"


class Up:
    """A running command and the events it has printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """The next event of this name with these values."""
        async with asyncio.timeout(DEADLINE):
            while line := await self.process.stdout.readline():
                event = json.loads(line)
                if event["event"] == name and all(event[key] == value for key, value in fields.items()):
                    return event
        raise AssertionError(f"ended with {await self.process.wait()} before {name} {fields}")


@asynccontextmanager
async def up(tmp_path: Path, *args: str, spec: Mapping[str, Any] | None = None) -> AsyncIterator[Up]:
    """The command with `MANIFEST`, which `spec` adds to."""
    file = tmp_path / "small.yaml"
    manifest = yaml.safe_load(MANIFEST)
    manifest["spec"].update(spec or {})
    file.write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "kvcluster", "up", str(file), "--port", "0", "--management-port", "0"]
    process = await asyncio.create_subprocess_exec(
        *command, "--log-dir", str(tmp_path / "logs"), *args, stdout=PIPE, cwd=ROOT, limit=2**20
    )
    try:
        yield Up(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_serves_restarts_what_dies_and_stops_cleanly(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    (secret := tmp_path / "secrets" / "api-keys").mkdir(parents=True)
    (secret / "keys.yaml").write_text(f"keys: [{{key: {KEY}, tenant: a}}]")
    args = ["--strategy", "round_robin", "--self-signed", "--secrets", str(tmp_path / "secrets")]
    spec = {"router": {"auth": AUTH}}
    async with up(tmp_path, "--json", *args, spec=spec) as command, AsyncExitStack() as stack:
        ignored = await command.event("message")
        assert ignored["message"] == "spec.workers.nodeSelector: only a cluster honours it; ignored here"
        ready = await command.event("ready")
        trusted = tls_context(tmp_path / "logs" / "certificate" / "tls.crt")
        client = await stack.enter_async_context(httpx.AsyncClient(verify=trusted))
        assert ready["url"].startswith("https://127.0.0.1:")
        completions, body = f"{ready['url']}/v1/completions", {"prompt": "Hello", "max_tokens": 2}
        assert (await client.post(completions, json=body)).status_code == 401
        answer = await client.post(completions, json=body, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-kvcluster-strategy"] == "round_robin"
        assert answer.headers["x-kvcluster-worker"] in ("small-worker-0", "small-worker-1")

        workers = f"{ready['management_url']}/workers"
        assert (await client.get(workers)).status_code == 401, "the port asks for the token in the environment"
        assert (await client.get(workers, headers=management_headers())).status_code == 200
        status = await command.event("status")
        assert [worker["routable"] for worker in status["workers"]] == [True, True]
        pids = [status["router"]["pid"], *(worker["process"]["pid"] for worker in status["workers"])]
        os.kill(pids[1], signal.SIGKILL)
        died = await command.event("process", name="small-worker-0", state="backoff")
        assert died["detail"].startswith("was killed by SIGKILL")
        back = await command.event("process", name="small-worker-0", state="ready")
        assert (back["restarts"], back["url"]) == (1, died["url"])

        command.process.send_signal(signal.SIGINT)
        await command.event("message", message="stopped")
        assert await command.process.wait() == 0
        assert not any(runs(pid) for pid in (*pids, back["pid"]))
    assert sorted(file.name for file in (tmp_path / "logs").iterdir()) == [
        *("certificate", "small-router.log", "small-worker-0.log", "small-worker-1.log"),
    ]


async def test_lines_where_there_is_no_terminal(tmp_path):
    async with up(tmp_path) as command:
        lines = []
        async with asyncio.timeout(DEADLINE):
            while line := (await command.process.stdout.readline()).decode():
                lines.append(line.split(" ", 1)[1].rstrip())
                if lines[-1].startswith("ready: "):
                    command.process.send_signal(signal.SIGTERM)
        assert await command.process.wait() == 0
    assert any(line.startswith("small-router ready (pid ") for line in lines)
    assert lines[-1] == "stopped"


async def test_settings_a_worker_refuses_end_the_command_with_its_words(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(MANIFEST.replace("speed: 50", "args: [--max-num-seqs=none]"))
    command = [sys.executable, "-m", "kvcluster", "up", str(file), "--port", "0", "--management-port", "0"]
    command += ["--log-dir", str(tmp_path / "logs")]
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, cwd=ROOT)
    async with asyncio.timeout(DEADLINE):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert "error: does not start: small-worker-" in said.decode()
    assert "exited with code 2" in said.decode()
    assert "--max-num-seqs: Input should be a valid integer" in said.decode()


def test_a_secret_that_is_not_there_is_refused_before_anything_starts(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(MANIFEST + f"  router: {{auth: {json.dumps(AUTH)}}}\n")
    ran = CliRunner().invoke(app, ["up", str(file), "--secrets", str(tmp_path / "secrets")])
    assert ran.exit_code == 2
    assert f"spec.router.auth.keysSecretRef: there is no file {tmp_path}/secrets/api-keys/keys.yaml" in ran.output


def test_a_token_that_is_none_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "small.yaml"
    file.write_text(MANIFEST)
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    ran = CliRunner().invoke(app, ["up", str(file)])
    assert ran.exit_code == 2
    assert "KVCLUSTER_MANAGEMENT_TOKEN: token 1 must have 16 characters or more" in ran.output
