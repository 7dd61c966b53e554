"""The running vLLM, named by environment variables. Without them nothing in this folder is collected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from kvcache.chat.request import ChatOptions
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer

URL = "REAL_VLLM_URL"

collect_ignore_glob = [] if URL in os.environ else ["test_*.py"]


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
def engine() -> Engine:
    url = os.environ[URL]
    (model, *_) = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    return Engine(
        url=url,
        events=os.environ["REAL_VLLM_EVENTS"],
        replay=os.environ.get("REAL_VLLM_REPLAY", ""),
        tokenizer=os.environ["REAL_VLLM_TOKENIZER"],
        model=model["id"],
        max_model_len=model["max_model_len"],
    )


@pytest.fixture(scope="session")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=engine.url, timeout=60, trust_env=False) as one:
        yield one


@pytest.fixture(scope="session")
def tokenizer(engine: Engine) -> Tokenizer:
    return load_tokenizer(engine.tokenizer, ChatOptions(trust_request_chat_template=True))


@pytest.fixture(scope="session")
def seed() -> int:
    return int(os.environ.get("REAL_VLLM_SEED", "1"))


@pytest.fixture(scope="session")
def number() -> int:
    """How many random requests."""
    return int(os.environ.get("REAL_VLLM_REQUESTS", "300"))
