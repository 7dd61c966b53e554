"""Runs the commands of docs/vllm.md as they are written, with other ports and names."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.processes import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
"""The model that the page speaks of."""


def commands() -> list[str]:
    """Every command behind a prompt in the page, lines that go on joined."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found = []
    for block in blocks:
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            words = re.match(r"(?:'[^']*'|\\\n|[^\n'])*", command)
            assert words is not None
            found.append(words[0].replace("\\\n", " "))
    return found


def one(start: str) -> str:
    """The one command that begins like this."""
    found = [command for command in commands() if command.startswith(start)]
    assert len(found) == 1, f"docs/vllm.md has {len(found)} commands that begin with {start!r}"
    return found[0]


def engine_flags() -> dict[str, Any]:
    """The flags of `vllm serve`, with --kv-events-config parsed."""
    words = shlex.split(one("vllm serve"))[3:]
    flags: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            flags[word] = True
            last = word
        else:
            flags[last] = json.loads(word) if word.startswith("{") else word
    return flags


class Shell:
    """Runs commands with words replaced: the page's ports by free ones, its model by another."""

    def __init__(self, folder: Path, words: Mapping[str, str]) -> None:
        self._folder = folder
        self._words = words
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}

    def written(self, command: str) -> list[str]:
        return shlex.split(re.sub("|".join(map(re.escape, self._words)), lambda found: self._words[found[0]], command))

    async def output(self, command: str) -> str:
        process = await self._begin(command)
        output, _ = await process.communicate()
        assert process.returncode == 0, f"{command}\n{output.decode()}"
        return output.decode()

    @contextlib.asynccontextmanager
    async def running(self, command: str, more: str = "") -> AsyncIterator[Process]:
        process = await self._begin(f"{command} {more}")
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()

    async def _begin(self, command: str) -> Process:
        words = self.written(command)
        return await asyncio.create_subprocess_exec(
            *words, cwd=self._folder, env=self._environment, stdout=PIPE, stderr=STDOUT
        )


async def follow(folder: Path, *, engine: str, events: str, replay: str, tokenizer: str) -> None:
    """All that the page does by hand, beside an engine at these addresses; asserts what the page says comes of it."""
    agent, router, management = str(free_port()), str(free_port()), str(free_port())
    shell = Shell(
        folder,
        {
            "http://127.0.0.1:8100": engine,
            "http://127.0.0.1:8101": f"http://127.0.0.1:{agent}",
            "http://127.0.0.1:8000": f"http://127.0.0.1:{router}",
            "http://127.0.0.1:9000": f"http://127.0.0.1:{management}",
            MODEL: tokenizer,
        },
    )
    # Where the engine listens is the page's default, which only the ports of this run differ from.
    moved = f"--port {agent} --engine-url {engine} --events-endpoint {events} --replay-endpoint {replay}"
    ports = f"--port {router} --management-port {management}"
    async with (
        shell.running(one("python -m worker.agent.main"), moved),
        shell.running(one("python -m router.main"), ports),
    ):
        await _matching(f"http://127.0.0.1:{management}/workers")
        assert json.loads(await shell.output(one("curl -s http://127.0.0.1:8101/health"))) == {"complete": True}
        (worker,) = json.loads(await shell.output(one("curl -s http://127.0.0.1:9000/workers")))["workers"]
        assert (worker["worker_id"], worker["url"]) == ("vllm-0", engine)
        assert (worker["ready"], worker["matching"]) == (True, True)
        ask = one("curl -s -i http://127.0.0.1:8000/v1/completions")
        await shell.output(ask)
        await _held(f"http://127.0.0.1:{management}/workers", 4)
        head, _, body = (await shell.output(ask)).replace("\r", "").partition("\n\n")
        assert "x-kvcluster-matched-blocks: 4" in head
        assert json.loads(body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 64


async def _matching(url: str) -> None:
    await _until(url, lambda worker: worker["matching"] and worker["ready"])


async def _held(url: str, blocks: int) -> None:
    await _until(url, lambda worker: worker["blocks"] >= blocks)


async def _until(url: str, holds: Any) -> None:
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if any(holds(worker) for worker in (await client.get(url)).json()["workers"]):
                    return
            await asyncio.sleep(0.05)
