"""LoRA adapters of a running engine: an agent keeps a list of them loaded, and the router predicts their cached tokens.

A vLLM needs `--enable-lora --max-loras 2`, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and `REAL_VLLM_ADAPTERS`, two
adapters that it can load: `NAME=FOLDER,NAME=FOLDER`. Not covered: the mix of all kinds of requests, which has adapters
too where the engine has some loaded (`test_predictions.py`).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvcache.keys import CacheScope, block_keys
from kvcache.tokens.tokenizer import Tokenizer
from tests.real_vllm.bed import Bed, bed
from tests.real_vllm.served import Emulated, Running, Served
from tests.router.conftest import StartRouter, until

pytestmark = [pytest.mark.process, pytest.mark.real_vllm, pytest.mark.timeout(900)]

ADAPTERS = "REAL_VLLM_ADAPTERS"
FLAGS = ("--enable-lora", "--max-loras", "2", "--allow-runtime-lora-updating")


def sources(kind: str) -> dict[str, str]:
    """Two adapters that the engine can load, by name."""
    given = os.environ[ADAPTERS] if kind == "vllm" else "sql=acme/sql,law=acme/law"
    return dict(pair.split("=", 1) for pair in given.split(","))


@pytest.fixture(params=["emulated", *(["vllm"] if ADAPTERS in os.environ else [])])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
async def engine_with_lora(
    kind: str, vllm: Running | None, tmp_path: Path, emulator_tokenizer: Tokenizer
) -> AsyncIterator[Served]:
    one: Served = vllm if vllm is not None and kind == "vllm" else Emulated(tmp_path, emulator_tokenizer, *FLAGS)
    await one.start()
    try:
        yield one
    finally:
        await one.close()


def want(file: Path, listed: dict[str, str]) -> None:
    file.write_text(json.dumps([{"name": name, "source": source} for name, source in listed.items()]))


async def loaded(one: Bed, *names: str) -> None:
    """Wait until the router has been told that exactly these are loaded."""
    known = one.router.router.fleet.directory
    await until(lambda: [each.name for each in known.catalogue.served.values() if each.adapter] == list(names))


async def test_predicted_is_reported_for_the_adapters_that_an_agent_keeps_loaded(
    engine_with_lora: Served, start_router: StartRouter, kind: str, tmp_path: Path, seed: int, number: int
) -> None:
    listed, file, rng = sources(kind), tmp_path / "adapters.json", random.Random(seed)
    first, second = listed
    want(file, listed)
    shared = [[rng.randrange(50_000) for _ in range(200)] for _ in range(3)]
    async with bed(engine_with_lora, start_router, adapters_file=file) as one:
        await loaded(one, first, second)
        wrong, equal, cached = [], 0, 0
        for _ in range(number):
            model = rng.choice([first, second, engine_with_lora.model])
            prompt = [*rng.choice(shared)[: rng.randrange(20, 200)], *(rng.randrange(50_000) for _ in range(20))]
            outcome = await one.complete(prompt, model=model)
            equal += outcome.verdict == "equal"
            cached += outcome.cached or 0
            if outcome.verdict != "equal":
                wrong.append((model, outcome))
        print(f"\nseed {seed}: {equal} of {number} equal, {cached} cached tokens")  # noqa: T201
        assert not wrong, wrong[:3]
        assert cached > 0
        unknown = await one.complete(shared[0], model="nobody")
        assert (unknown.status, "does not exist" in unknown.text) == (404, True)

        want(file, {second: listed[second]})
        await loaded(one, second)
        assert (await one.complete(shared[0], model=first)).status == 404


async def test_a_name_that_is_pointed_elsewhere_finds_nothing_of_before(
    engine_with_lora: Served, start_router: StartRouter, kind: str, tmp_path: Path
) -> None:
    """vLLM hashes the path. The emulated engine does not, which then finds more than the router predicts."""
    (name, source), (_, other) = sources(kind).items()
    file, prompt = tmp_path / "adapters.json", list(range(7000, 7100))
    want(file, {name: source})
    async with bed(engine_with_lora, start_router, adapters_file=file) as one:
        await loaded(one, name)
        for _ in range(2):
            before = await one.complete(prompt, model=name)
        assert (before.predicted, before.cached) == (96, 96)
        want(file, {name: other})
        first_block, *_ = block_keys(prompt, 16, CacheScope(adapter=name))
        await until(lambda: first_block not in one.held())
        after = await one.complete(prompt, model=name)
        assert after.predicted == 0
        if kind == "vllm":
            assert after.cached == 0
            again = await one.complete(prompt, model=name)
            assert (again.predicted, again.cached) == (96, 96)
