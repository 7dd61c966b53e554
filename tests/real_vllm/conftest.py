"""The engines of the suite. An emulated engine is always there; a running vLLM is named by environment variables."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.real_vllm.served import START, URL, Emulated, Running, Served, chat_options, emulated_tokenizer
from tests.router.conftest import StartRouter, router_starter

COMPARED_WITH_A_RUNNING_ONE = ["test_answers.py", "test_documents.py", "test_prompts.py"]
"""These compare our code with a vLLM, so that there is nothing to compare without one."""

collect_ignore = [] if URL in os.environ else COMPARED_WITH_A_RUNNING_ONE

SETTINGS = {
    "maps": lambda folder, tokenizer: Emulated(folder, tokenizer, "--kv-events-format", "map", adapters=("sql", "law")),
    "arrays": lambda folder, tokenizer: Emulated(
        folder, tokenizer, "--kv-events-format", "array", adapters=("sql", "law")
    ),
    "ranks": lambda folder, tokenizer: Emulated(folder, tokenizer, adapters=("sql", "law"), ranks=2),
}
"""The emulated engines: how one writes its events, and one of two ranks."""


@pytest.fixture(scope="session")
def emulator_tokenizer() -> Tokenizer:
    return emulated_tokenizer()


@pytest.fixture(scope="session")
def start_router(emulator_tokenizer: Tokenizer) -> StartRouter:
    return router_starter(emulator_tokenizer)


VLLM = ["vllm"] if URL in os.environ else []
RESTARTING_VLLM = VLLM if START in os.environ else []


@pytest.fixture(scope="session")
def vllm() -> Iterator[Running | None]:
    """The running vLLM, if there is one."""
    one = Running() if VLLM else None
    yield one
    if one is not None:
        one.end()


ServedOf = Callable[[str], Served]


@pytest.fixture
def served_of(vllm: Running | None, tmp_path: Path, emulator_tokenizer: Tokenizer) -> ServedOf:
    """The engine of a setting, not started yet."""

    def of(setting: str) -> Served:
        if setting in SETTINGS:
            return SETTINGS[setting](tmp_path, emulator_tokenizer)
        assert vllm is not None
        return vllm

    return of


@pytest.fixture(params=[*SETTINGS, *VLLM])
async def served(request: pytest.FixtureRequest, served_of: ServedOf) -> AsyncIterator[Served]:
    """An engine, which is idle."""
    async with started(served_of(request.param)) as one:
        yield one


@pytest.fixture(params=[*SETTINGS, *RESTARTING_VLLM])
async def restarting(request: pytest.FixtureRequest, served_of: ServedOf) -> AsyncIterator[Served]:
    """An engine whose process may be ended and started again."""
    async with started(served_of(request.param)) as one:
        yield one


@contextlib.asynccontextmanager
async def started(one: Served) -> AsyncIterator[Served]:
    await one.start()
    try:
        yield one
    finally:
        await one.close()


@dataclass(frozen=True)
class Engine:
    """A running vLLM: its API server, its two ZMQ endpoints, its tokenizer."""

    url: str
    events: str
    replay: str
    tokenizer: str
    model: str
    max_model_len: int


@pytest.fixture(scope="session")
def engine(vllm: Running | None) -> Engine:
    assert vllm is not None
    asyncio.run(vllm.start())
    return Engine(
        url=vllm.url,
        events=vllm.events,
        replay=vllm.replay,
        tokenizer=os.environ["REAL_VLLM_TOKENIZER"],
        model=vllm.model,
        max_model_len=vllm.max_model_len,
    )


@pytest.fixture(scope="session")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=engine.url, timeout=60, trust_env=False) as one:
        yield one


@pytest.fixture(scope="session")
def engine_tokenizer(engine: Engine) -> Tokenizer:
    return load_tokenizer(engine.tokenizer, chat_options())


@pytest.fixture(scope="session")
def seed() -> int:
    return int(os.environ.get("REAL_VLLM_SEED", "1"))


@pytest.fixture(scope="session")
def number() -> int:
    """How many random requests."""
    return int(os.environ.get("REAL_VLLM_REQUESTS", "300" if URL in os.environ else "60"))
