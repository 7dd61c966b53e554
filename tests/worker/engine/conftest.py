"""Engines with the figures of the default profile, and requests whose output is scripted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from kvcache.profiles import LatencyModel
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.request import EngineRequest, Output

LATENCY = LatencyModel(prefill_base=0.005, prefill_block=0.0025, prefill_cached=0.0005, decode=0.015)
EOS = 2


class Script:
    """A token source that says what it is told, and 7 after that."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = tokens

    def token(self, index: int) -> int | None:
        return self.tokens[index] if index < len(self.tokens) else 7


def make_engine(latency: LatencyModel = LATENCY, **settings: Any) -> Engine:
    """An engine with small limits."""
    limits: dict[str, Any] = {
        "blocks": 64, "max_num_batched_tokens": 2048, "max_num_seqs": 8, "max_model_len": 1024, "eos_token_id": EOS,
    } | settings  # fmt: skip
    limits["max_model_len"] = min(limits["max_model_len"], limits["blocks"] * limits.get("block_size", 16))
    return Engine(EngineConfig(**limits), latency)


@pytest.fixture
def request_of() -> Callable[..., EngineRequest]:
    """Builds a request from a prompt (or its length: then of tokens nobody else has) and scripted output."""
    count = itertools.count(1)

    def build(
        prompt: Sequence[int] | int, max_tokens: int = 1, output: Sequence[int] = (), **fields: Any
    ) -> EngineRequest:
        number = next(count)
        if isinstance(prompt, int):
            prompt = [number * 10_000 + i for i in range(prompt)]
        fields = {"request_id": f"r{number}", "source": Script(output)} | fields
        return EngineRequest(prompt=prompt, max_tokens=max_tokens, **fields)

    return build


def drain(engine: Engine, each: Callable[[Engine], object] = lambda engine: None) -> list[Output]:
    """Run an engine event by event until it is idle; all outputs."""
    outputs: list[Output] = []
    while (at := engine.next_event()) is not None:
        outputs += engine.advance(at)
        each(engine)
    return outputs


def serve(engine: Engine, requests: Iterable[EngineRequest], now: float = 0.0) -> list[Output]:
    """Submit requests at one moment and run the engine until it is idle; all outputs."""
    for request in requests:
        engine.submit(request, now)
    return drain(engine)
