"""The CPU time of the emulated engine: a block operation, a decoded token, a prefilled block.

Run `python -m bench.micro.engine`. A block operation must take the same time whatever the size of the cache. The last
column shows it: the time at 50,000 blocks over the time at 5,000. Memory that is further away from the processor makes
it somewhat more than 1; a search or a shift in a list would make it 10. The figures are CPU time and the best of
several rounds, so that other processes disturb them little.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable

from kvcache.keys import DEFAULT_SCOPE, BlockKey
from kvcache.profiles import DEFAULT_PROFILE, profile
from worker.emulator.engine.block_pool import BlockPool
from worker.emulator.engine.config import EngineConfig
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.events import BlocksStored
from worker.emulator.engine.request import EngineRequest
from worker.emulator.engine.tokens import SequenceTokens

RUN = 32
"""Blocks a sequence has."""
ROUNDS = 7


class _Endless:
    """A source of tokens that takes no time."""

    def token(self, index: int) -> int:
        return index & 1023


def _key(number: int) -> BlockKey:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()[:16]


def _pass(cache: BlockPool, keys: list[list[BlockKey]]) -> dict[str, float]:
    """Seconds for each block, by operation, in one pass: every sequence is allocated, released, hit and released
    again."""
    held: list[list[int]] = []
    content = SequenceTokens((), 16, DEFAULT_SCOPE)
    count = len(keys)
    # A stride spreads the operations over the cache: those that follow one another are far apart in memory.
    spread = [number * 7919 % count for number in range(count)]
    operations: dict[str, Callable[[int], None]] = {
        "allocate and evict": lambda n: held.append(cache.allocate(RUN)),
        "store": lambda n: cache.store(held[n], BlocksStored(tuple(keys[n]), None, content, 0)),
        "release": lambda n: cache.release(held[spread[n]]),
        "look up and acquire": lambda n: cache.acquire(cache.hits(keys[spread[n]])),
    }
    seconds = {}
    for name, operation in operations.items():
        start = time.process_time()
        for number in range(count):
            operation(number)
        seconds[name] = (time.process_time() - start) / (count * RUN)
    for blocks in held:
        cache.release(blocks)
    cache.take_events()
    return seconds


def block_operations(total: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds for each block, by operation, on a full cache of `total` blocks: the best of `rounds` passes over it."""
    cache = BlockPool(total)
    count = total // RUN
    passes = []
    for turn in range(rounds + 1):
        keys = [[_key((turn * count + n) * RUN + i) for i in range(RUN)] for n in range(count)]
        passes.append(_pass(cache, keys))
    passes = passes[1:]  # the first one fills an empty cache and evicts nothing
    return {name: min(measured[name] for measured in passes) for name in passes[0]}


def _engine(sequences: int) -> Engine:
    config = EngineConfig(
        blocks=50_000, max_num_batched_tokens=8192, max_num_seqs=sequences, max_model_len=131_072, eos_token_id=None
    )
    return Engine(config, profile(DEFAULT_PROFILE).latency)


def decode(sequences: int, tokens: int = 320, rounds: int = ROUNDS) -> float:
    """Seconds for each generated token, with this many sequences in each step."""
    best = float("inf")
    for _ in range(rounds):
        engine = _engine(sequences)
        for number in range(sequences):
            engine.submit(EngineRequest(str(number), [number] * 40, tokens, _Endless()), 0.0)
        engine.advance(0.0)
        start, made = time.process_time(), 0
        while (due := engine.next_event()) is not None:
            made += len(engine.advance(due))
            engine.take_events()
        best = min(best, (time.process_time() - start) / made)
    return best


def prefill(tokens: int, rounds: int = ROUNDS) -> tuple[float, float]:
    """Seconds for each block of a prompt of `tokens` tokens, from submission to first token: cold, and all cached."""
    cold = warm = float("inf")
    prompt = list(range(tokens))
    for _ in range(rounds):
        engine = _engine(1)
        seconds = []
        for now in (0.0, 1e6):
            start = time.process_time()
            engine.submit(EngineRequest("a", prompt, 1, _Endless()), now)
            engine.advance(now + 1e5)
            seconds.append((time.process_time() - start) / (tokens // 16))
        cold, warm = min(cold, seconds[0]), min(warm, seconds[1])
    return cold, warm


def report(rounds: int = ROUNDS) -> str:
    """The whole measurement as text."""
    small, large = block_operations(5_000, rounds), block_operations(50_000, rounds)
    lines = [f"{'ns a block':<24}{'5,000 blocks':>14}{'50,000 blocks':>15}{'ratio':>8}"]
    for name, seconds in small.items():
        lines.append(f"{name:<24}{seconds * 1e9:>14.0f}{large[name] * 1e9:>15.0f}{large[name] / seconds:>8.2f}")
    lines.append("")
    for sequences in (1, 16, 256):
        per_token = decode(sequences, rounds=rounds) * 1e6
        each = f"{per_token * sequences:.1f} a step"
        lines.append(f"decode, {sequences} a step: {per_token:.2f} us a token, {each}")
    cold, warm = prefill(123_000, rounds)
    lines.append(f"prompt of 123,000 tokens: {cold * 1e6:.2f} us a block cold, {warm * 1e6:.2f} us a block all cached")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(report())
