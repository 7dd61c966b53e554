"""Requests of several sequences: which one's cached tokens the answer will report, and how many these are (as
measured on vLLM 0.32).

Not covered: how a single prompt is read (test_prompts.py).
"""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from kvcache.feed import Load, Snapshot, WorkerInfo
from kvcache.keys import KEY_SCHEME, block_keys
from kvcache.profiles import LatencyModel
from kvcache.tokens.tokenizer import Tokenizer
from router.core.config import FleetConfig
from router.core.fleet import Fleet
from router.server.prompts import (
    CHAT,
    COMPLETIONS,
    PromptReader,
)

BLOCK = 16
URL = "http://worker:8000"


def prompt(tokens: int, which: int, common: int = 0) -> list[int]:
    """Token ids that share their first `common` with those of another number."""
    return [*range(common), *range(1000 * which, 1000 * which + tokens - common)]


def holding(tokenizer: Tokenizer, *prompts: list[int]) -> Fleet:
    """A fleet of one worker that holds these prompts."""
    fleet = Fleet(FleetConfig(BLOCK, tokenizer.fingerprint, latency=LatencyModel(0.005, 0.002, 0.0005, 0.01)))
    fleet.add(URL)
    held = dict.fromkeys(key for tokens in prompts for key in block_keys(tokens, BLOCK))
    info = WorkerInfo("w", 1, "m", BLOCK, tokenizer.fingerprint, KEY_SCHEME, 1000)
    fleet.apply_snapshot(URL, Snapshot(info, 0, Load(0, 0, 0, 1000, 1000), tuple((key, None) for key in held)), 0.0)
    return fleet


async def predicted(tokenizer: Tokenizer, fleet: Fleet, path: str = COMPLETIONS, **body: Any) -> int:
    """Cached tokens that the router expects the answer to report."""
    reader = PromptReader(tokenizer, BLOCK)
    try:
        route = await reader.read(path, orjson.dumps(body))
    finally:
        reader.close()
    return fleet.choose(route, 0.0).reported_blocks * BLOCK


A, B, C = prompt(100, 1), prompt(40, 2), prompt(80, 3)


@pytest.mark.parametrize(
    ("asked", "held", "stream", "reported"),
    [
        # n of one prompt: a whole answer reports the last one, which finds what the first one computes.
        pytest.param({"prompt": B, "n": 2}, [], False, 32, id="n=2"),
        pytest.param({"prompt": A, "n": 3}, [A], False, 96, id="n=3, held"),
        pytest.param({"prompt": B, "n": 2}, [], True, 0, id="n=2, stream"),
        pytest.param({"prompt": B, "n": 2}, [B], True, 32, id="n=2, held, stream"),
        pytest.param({"prompt": B, "n": 1}, [], False, 0, id="n=1"),
        pytest.param({"prompt": B, "n": None}, [B], False, 32, id="n is null, held"),
        # Several prompts: a whole answer reports the last one, a stream the first one.
        pytest.param({"prompt": [A, B]}, [], False, 0, id="two prompts"),
        pytest.param({"prompt": [A, B]}, [A], False, 0, id="two prompts, first held"),
        pytest.param({"prompt": [A, B]}, [A], True, 96, id="two prompts, first held, stream"),
        pytest.param({"prompt": [B, A]}, [A, B], False, 96, id="two prompts, both held"),
        pytest.param({"prompt": [B, A]}, [A, B], True, 32, id="two prompts, both held, stream"),
        pytest.param({"prompt": [prompt(33, 4), B, C]}, [C], False, 64, id="three prompts, last held"),
        pytest.param(
            {"prompt": [prompt(84, 1, 64), prompt(84, 2, 64), prompt(94, 3, 64)]},
            [],
            False,
            64,
            id="three prompts with a common prefix",
        ),
        pytest.param(
            {"prompt": [prompt(84, 1, 64), prompt(84, 2, 64), prompt(94, 3, 64)]},
            [],
            True,
            0,
            id="three prompts with a common prefix, stream",
        ),
        pytest.param({"prompt": [C, C]}, [], False, 64, id="twice the same prompt"),
        pytest.param({"prompt": [A, B], "n": 2}, [], False, 32, id="two prompts, n=2"),
        # Log-probabilities of the prompt: all of it is computed.
        pytest.param({"prompt": A, "prompt_logprobs": 0}, [A], False, 0, id="prompt_logprobs"),
        pytest.param({"prompt": A, "echo": True, "logprobs": 1}, [A], False, 0, id="echo with logprobs"),
        pytest.param({"prompt": A, "echo": True}, [A], False, 96, id="echo"),
        pytest.param({"prompt": A, "logprobs": 1}, [A], False, 96, id="logprobs"),
    ],
)
async def test_the_reported_sequence_is_predicted(
    tokenizer: Tokenizer, asked: dict[str, Any], held: list[list[int]], stream: bool, reported: int
) -> None:
    assert await predicted(tokenizer, holding(tokenizer, *held), stream=stream, **asked) == reported


async def test_an_echo_in_a_chat_reads_no_cache(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "word " * 100}]
    tokens = tokenizer.encode(tokenizer.render_chat({"messages": messages}))
    fleet = holding(tokenizer, tokens)
    assert await predicted(tokenizer, fleet, CHAT, messages=messages) == len(tokens) // BLOCK * BLOCK
    assert await predicted(tokenizer, fleet, CHAT, messages=messages, echo=True) == 0
    assert await predicted(tokenizer, fleet, CHAT, messages=messages, n=2) == len(tokens) // BLOCK * BLOCK


async def test_a_worker_that_is_not_matched_is_expected_to_hold_only_what_it_just_computed(
    tokenizer: Tokenizer,
) -> None:
    fleet = Fleet(FleetConfig(BLOCK, "other", latency=LatencyModel(0.005, 0.002, 0.0005, 0.01)))
    fleet.add(URL)
    fleet.mark_alive(URL, 0.0)
    assert await predicted(tokenizer, fleet, prompt=[A, A]) == 96
    assert await predicted(tokenizer, fleet, prompt=[A, B]) == 0


@pytest.mark.parametrize("odd", [[], {}, "2", 2.5, True, -1, 2**63, None], ids=repr)
async def test_odd_values_are_no_trouble(tokenizer: Tokenizer, odd: Any) -> None:
    for name in ("n", "echo", "logprobs", "stream", "max_tokens", "model", "cache_salt"):
        assert await predicted(tokenizer, holding(tokenizer, B), prompt=B, **{name: odd}) in (0, 32)
