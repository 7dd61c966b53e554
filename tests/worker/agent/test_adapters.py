"""LoRA adapters beside a real engine: what it has loaded is published, what should be loaded is, and stays so.

Not covered: when what is tried again (tests/worker/lora), and how routers use the names (tests/router/test_models.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvcache.keys import BlockKey, CacheScope, block_keys
from tests.processes import eventually
from tests.worker.agent.conftest import Running, Start
from tests.worker.agent.engine import FakeEngine
from worker.agent.engine import Models, parse_models

TOKENS = list(range(32))


class LoraEngine(FakeEngine):
    """An engine that lists its models, and loads adapters at run time from every source but `acme/none`."""

    def __init__(self, *, runtime: bool = True) -> None:
        super().__init__()
        self.loaded: dict[str, str] = {}
        self.runtime = runtime
        self.bodies: list[dict[str, Any]] = []

    async def respond(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/models":
            cards = [{"id": name, "root": "base", "parent": None} for name in ("m", "m-2")]
            cards += [{"id": name, "root": root, "parent": "m"} for name, root in self.loaded.items()]
            return 200, json.dumps({"object": "list", "data": cards}).encode()
        if path not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") or not self.runtime:
            return 404, b'{"detail":"Not Found"}'
        asked = json.loads(body)
        self.bodies.append(asked)
        if path == "/v1/unload_lora_adapter":
            del self.loaded[asked["lora_name"]]
            return 200, b"Success"
        if asked["lora_path"] == "acme/none":
            return 404, b'{"error":{"message":"Loading lora none failed: No adapter found for acme/none","code":404}}'
        if asked["lora_name"] in self.loaded and not asked.get("load_inplace"):
            return 400, b'{"error":{"message":"has already been loaded","code":400}}'
        self.loaded[asked["lora_name"]] = asked["lora_path"]
        return 200, b"Success"

    async def store(self, name: int, adapter: str | None) -> None:
        """Publish two blocks of a prompt for this adapter."""
        hashes = [name, name + 1]
        event = {
            "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None, "token_ids": TOKENS,
            "block_size": 16, "lora_id": 1 if adapter else None, "lora_name": adapter,
            "extra_keys": [[adapter], [adapter]] if adapter else None,
        }  # fmt: skip
        await self.publish(msgpack.packb([0.0, [event], 0]))


Stated = tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]
"""Names, adapters and missing adapters."""


async def until(running: Running, holds: Callable[[Stated], bool]) -> None:
    """Wait until this holds of what the feed states."""

    async def now() -> bool:
        return (await running.health())[0] == 200 and holds(await stated(running))

    await eventually(now)


async def until_keys(running: Running, holds: Callable[[Counter[BlockKey]], bool]) -> None:
    async def now() -> bool:
        return holds(await running.keys())

    await eventually(now)


async def stated(running: Running) -> Stated:
    info = (await running.snapshot()).info
    return info.names, info.adapters, dict(info.missing_adapters)


def want(file: Path, **sources: str) -> None:
    file.write_text(json.dumps([{"name": name, "source": source} for name, source in sources.items()]))


async def test_what_the_engine_serves_is_published(beside: Start) -> None:
    async with LoraEngine() as engine:
        engine.loaded["sql"] = "acme/sql"
        async with beside(engine, model="m") as running:
            await until(running, lambda now: now == (("m-2",), ("sql",), {}))
            engine.loaded["law"] = "acme/law"
            await until(running, lambda now: now == (("m-2",), ("sql", "law"), {}))
            assert engine.bodies == []


async def test_wanted_adapters_are_loaded_replaced_and_unloaded_and_come_back_after_a_restart(
    beside: Start, tmp_path: Path
) -> None:
    file = tmp_path / "adapters.json"
    want(file, sql="acme/sql")
    async with LoraEngine() as engine:
        engine.loaded["old"] = "acme/old"
        async with beside(engine, model="m", adapters_file=file) as running:
            await until(running, lambda now: now[1:] == (("sql",), {}))
            want(file, sql="acme/sql-2", law="acme/law")
            await until(running, lambda now: now[1] == ("sql", "law"))
            assert engine.loaded == {"sql": "acme/sql-2", "law": "acme/law"}
            assert {"lora_name": "sql", "lora_path": "acme/sql-2", "load_inplace": True} in engine.bodies
            engine.loaded.clear()
            await until(running, lambda now: now[1] == ("sql", "law") and bool(engine.loaded))


@pytest.mark.parametrize(
    ("runtime", "why"),
    [
        pytest.param(True, "Loading lora none failed: No adapter found for acme/none", id="the engine's own words"),
        pytest.param(False, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", id="an engine that loads none at run time"),
    ],
)
async def test_what_the_engine_refuses_is_published_with_the_reason(
    beside: Start, tmp_path: Path, runtime: bool, why: str
) -> None:
    file = tmp_path / "adapters.json"
    want(file, none="acme/none")
    async with LoraEngine(runtime=runtime) as engine, beside(engine, model="m", adapters_file=file) as running:
        await until(running, lambda now: why in now[2].get("none", ""))
        assert await running.metric("adapter_failures_total") == 1
        assert await running.metric("adapters", state="missing") == 1


async def test_blocks_of_an_adapter_that_comes_from_elsewhere_are_no_longer_published(beside: Start) -> None:
    """vLLM hashes an adapter's path into its blocks, and says nothing of it in its events."""
    async with LoraEngine() as engine:
        engine.loaded |= {"sql": "acme/sql", "law": "acme/law"}
        async with beside(engine, model="m") as running:
            await until(running, lambda now: len(now[1]) == 2)
            for name, adapter in ((1, "sql"), (11, "law"), (21, None)):
                await engine.store(name, adapter)
            await until_keys(running, lambda keys: len(keys) == 6)
            engine.loaded["sql"] = "acme/sql-2"
            kept = {*block_keys(TOKENS, 16, CacheScope(adapter="law")), *block_keys(TOKENS, 16)}
            await until_keys(running, lambda keys: set(keys) == kept)
            await engine.store(31, "sql")
            await until_keys(running, lambda keys: len(keys) == 6)


@pytest.mark.parametrize("text", ["", "[]", '{"data": {}}', '{"data": [1]}', '{"data": [{}]}'])
def test_what_is_no_list_of_models_names_none(text: str) -> None:
    assert parse_models(text) == Models((), {})
