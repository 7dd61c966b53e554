"""The commands of README.md and docs/vllm.md work as they are written.

Not covered: the README's commands for Kubernetes (tests/kube/e2e/test_headline.py), docs/helm.md
(tests/deploy/test_helm_docs.py), `make` targets, the commands of docs/real-vllm.md, which need vLLM
(tests/real_vllm/test_documents.py), and what the pages state beside commands (tests/test_documents.py).
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from pathlib import Path

import httpx
import pytest

from kvcache.tokens.tokenizer import load_tokenizer
from tests.processes import eventually, free_port
from tests.real_vllm.documents import follow
from tests.worker.agent.miniature import MiniatureEngine

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every line behind a prompt in the README, without its comment and the `&` that puts it in the background."""
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:].partition("  #")[0].strip().removesuffix("&").strip() for line in lines]


class Shell:
    """Runs the README's commands with its ports replaced by free ones, in a folder that holds the examples."""

    def __init__(self, folder: Path) -> None:
        (folder / "examples").symlink_to(ROOT / "examples")
        self._folder = folder
        self._ports = {port: str(free_port()) for port in ("8000", "9000", "8101")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}

    def port(self, port: str) -> str:
        return self._ports[port]

    async def start(self, command: str) -> Process:
        for port, free in self._ports.items():
            command = re.sub(rf"(?<=[: ]){port}\b", free, command)
        words = shlex.split(command)
        settings = {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            settings[name] = value
        return await asyncio.create_subprocess_exec(
            *words, cwd=self._folder, env={**self._environment, **settings}, stdout=PIPE, stderr=STDOUT
        )

    async def run(self, command: str) -> str:
        process = await self.start(command)
        output, _ = await process.communicate()
        assert process.returncode == 0, f"{command}\n{output.decode()}"
        return output.decode()


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    output = await process.stdout.read()
    assert await process.wait() == 0, output.decode()


async def _answers(url: str) -> bool:
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            return (await client.get(url)).status_code == 200
        except httpx.HTTPError:
            return False


def _one(start: str) -> str:
    found = [command for command in commands() if command.startswith(start)]
    assert len(found) == 1, f"the README has {len(found)} commands that begin with {start!r}"
    return found[0]


async def test_a_cluster_is_run_asked_explained_and_driven(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    ports = f" --port {shell.port('8000')} --management-port {shell.port('9000')}"
    cluster = await shell.start(_one("kvcluster up") + ports)
    try:
        management = f"http://127.0.0.1:{shell.port('9000')}"
        await eventually(lambda: _answers(f"{management}/ready"), "the cluster is ready", 60)
        assert '"text_completion"' in await shell.run(_one("curl"))
        explained = await shell.run(_one("kvcluster route") + f" --router {management}")
        assert "rag-worker-0" in explained
        driven = await shell.run(_one("kvcluster bench"))
        assert "TTFT" in driven
        # Without a terminal it prints what there is and ends.
        assert "rag-worker-0" in await shell.run(f"{_one('kvcluster top')} {management}")
        assert "hit rate" in await shell.run(f"{_one('kvcluster metrics')} {management}")
    finally:
        await _stop(cluster)


async def test_strategies_are_compared_live_and_in_virtual_time(tmp_path: Path) -> None:
    """With fewer requests than on the page."""
    shell = Shell(tmp_path)
    assert "longest_prefix" in await shell.run(_one("kvcluster compare").replace("--limit 200", "--limit 30"))
    for file in ("results_cache_aware.json", "strategy_comparison_summary.json", "strategy_comparison.png"):
        assert (tmp_path / "results" / file).stat().st_size > 0
    assert "pooled ceiling" in await shell.run(_one("kvcluster simulate") + " --limit 200")


async def test_a_router_and_a_worker_run_by_themselves(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    router = await shell.start(_one("ROUTING_STRATEGY=") + f" --management-port {shell.port('9000')} --port 0")
    try:
        worker = await shell.start(_one("python -m worker.main"))
        try:
            management = f"http://127.0.0.1:{shell.port('9000')}"
            await eventually(lambda: _answers(f"{management}/ready"), "the worker has registered itself", 60)
        finally:
            await _stop(worker)
    finally:
        await _stop(router)


async def test_the_page_on_vllm_is_followed_beside_a_miniature_of_vllm(tmp_path: Path) -> None:
    async with MiniatureEngine(load_tokenizer("gpt2")) as engine:
        await follow(
            tmp_path,
            engine=engine.url,
            events=engine.events_endpoint,
            replay=engine.replay_endpoint,
            tokenizer="gpt2",
        )
