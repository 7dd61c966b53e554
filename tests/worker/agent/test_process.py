"""`python -m worker.agent.main` as a pod runs it: settings from the environment, the feed, memory, and a quick end.

Not covered: the pod itself (`tests/kube`), and the contents of the feed beyond one capture (`test_agent.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer as WordTokenizer
from tokenizers.models import WordLevel

from kvcache.feed import MSGPACK, Snapshot, decode_snapshot
from kvcache.keys import BlockKey
from kvcache.tokens.tokenizer import load_tokenizer
from tests.worker.agent.captures import cached, messages
from tests.worker.agent.engine import FakeEngine, payloads

pytestmark = pytest.mark.process

RSS_LIMIT = 120 * 2**20


class AgentProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.client = httpx.AsyncClient()

    async def line(self, event: str) -> str:
        """Wait for the log line of this event."""
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            if event in raw.decode().split():
                return raw.decode()
        raise AssertionError(f"the agent ended without logging {event}")

    async def ready(self) -> None:
        port = re.search(r" port=(\d+) ", await self.line("agent_started"))
        assert port is not None
        self.client.base_url = httpx.URL(f"http://127.0.0.1:{port[1]}")

    async def snapshot(self) -> Snapshot | None:
        reply = await self.client.get("/cache/state", headers={"accept": MSGPACK})
        return decode_snapshot(reply.content, MSGPACK) if reply.status_code == 200 else None

    async def holds(self, expected: Counter[BlockKey]) -> Snapshot:
        async with asyncio.timeout(30):
            while True:
                snapshot = await self.snapshot()
                if snapshot is not None and Counter(key for key, _ in snapshot.blocks) == expected:
                    return snapshot
                await asyncio.sleep(0.02)

    async def health(self) -> int:
        return (await self.client.get("/health")).status_code


def resident(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextlib.asynccontextmanager
async def running(*argv: str, **env: str) -> AsyncIterator[AgentProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker.agent.main", "--host", "127.0.0.1", "--port", "0", *argv,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, **env},
    )  # fmt: skip
    agent = AgentProcess(process)
    try:
        yield agent
    finally:
        await agent.client.aclose()
        if process.returncode is None:
            process.kill()
        await process.communicate()


def beside(engine: FakeEngine) -> dict[str, str]:
    return {
        "AGENT_ENGINE_URL": engine.url,
        "AGENT_EVENTS_ENDPOINT": engine.events_endpoint,
        "AGENT_REPLAY_ENDPOINT": engine.replay_endpoint,
        "AGENT_WORKER_ID": "rag-worker-abc",
        "AGENT_POLL_INTERVAL": "0.1",
    }


async def test_a_capture_before_a_gap_and_after_a_restart() -> None:
    captured, other = messages("kv_events_small"), messages("kv_events_cbor_bytes")
    third = len(captured) // 3
    async with FakeEngine() as engine:
        await engine.publish(*payloads(captured[:third]))
        async with running(**beside(engine)) as agent:
            await agent.ready()
            first = await agent.holds(cached(captured[:third]))
            assert first.info.worker_id == "rag-worker-abc"
            assert first.info.fingerprint == load_tokenizer("gpt2").fingerprint
            engine.lose(*payloads(captured[third : 2 * third]))
            await engine.publish(*payloads(captured[2 * third :]))
            second = await agent.holds(cached(captured))
            assert (second.info.epoch, await agent.health()) == (first.info.epoch, 200)
            await engine.stop()
            await engine.start()
            await engine.publish(*payloads(other))
            third_snapshot = await agent.holds(cached(other))
            assert third_snapshot.info.epoch > first.info.epoch


async def test_it_waits_for_its_engine_is_small_and_ends_quickly() -> None:
    async with FakeEngine() as engine:
        engine.health = 503
        async with running(**beside(engine)) as agent:
            await agent.ready()
            assert await agent.health() == 503
            engine.health = 200
            await agent.holds(Counter())
            assert resident(agent.process.pid) < RSS_LIMIT
            async with agent.client.stream("GET", "/cache/events") as stream:
                lines = stream.aiter_lines()
                await anext(lines)
                agent.process.send_signal(signal.SIGTERM)
                async for _ in lines:  # ends, instead of breaking off
                    pass
            async with asyncio.timeout(30):
                assert await agent.process.wait() == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(["--events-endpoint", "tcp://*:5557"], "--events-endpoint", id="wildcard address"),
        pytest.param(["--events-endpoint", ""], "--events-endpoint", id="no events"),
        pytest.param(["--engine-url", "vllm"], "--engine-url", id="no URL"),
        pytest.param(["--default-chat-template-kwargs", "[]"], "--default-chat-template-kwargs", id="no object"),
    ],
)
async def test_settings_that_cannot_be_served(argv: list[str], words: str) -> None:
    async with running(*argv) as agent:
        _, errors = await agent.process.communicate()
        assert agent.process.returncode == 2
        assert errors.startswith(b"agent: ")
        assert words in errors.decode()


async def test_without_a_tokenizer_it_serves_and_goes_on_trying(tmp_path: Path) -> None:
    folder = tmp_path / "filled-later"
    async with FakeEngine() as engine, running("--tokenizer", str(folder), **beside(engine)) as agent:
        await agent.ready()
        assert str(folder) in await agent.line("tokenizer_failed")
        unmatched = await agent.holds(Counter())
        assert unmatched.info.fingerprint == "unknown"
        folder.mkdir()
        WordTokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
        await agent.line("prompts_unchecked")
        matched = await agent.holds(Counter())
        assert matched.info.fingerprint == load_tokenizer(str(folder)).fingerprint
        assert matched.info.epoch > unmatched.info.epoch
