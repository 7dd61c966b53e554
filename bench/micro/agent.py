"""The time and memory that a block of a real engine takes in the agent: `python -m bench.micro.agent [--blocks N]
[--json]`.

Prompts of 256 blocks are stored with 64 blocks in an event (a chunk of prefill), then 16 more blocks one by one
(decode), until the cache is full; then half of them are removed, one in each event, as vLLM does. Times include
msgpack. Memory is the growth of the process. Beside it stands that of the rejected design: tokens and a link to the
parent instead of hash states.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import orjson

from kvcache.keys import pack_tokens
from worker.agent.core.events import decode
from worker.agent.core.groups import EngineBlocks

PROMPT, RUN, DECODED = 256, 64, 16


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _stores(blocks: int, size: int, rng: random.Random) -> Iterator[tuple[list[int], bytes]]:
    """(names, payload) of batches that store `blocks` blocks, and a few more."""
    stored = 0
    while stored < blocks:
        parent: int | None = None
        for count in [RUN] * (PROMPT // RUN) + [1] * DECODED:
            names = [rng.getrandbits(64) for _ in range(count)]
            tokens = [rng.randrange(128_000) for _ in range(count * size)]
            event = {
                "type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": tokens,
                "block_size": size, "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": [None] * count,
                "group_idx": 0, "kv_cache_spec_kind": "full_attention",
            }  # fmt: skip
            yield names, msgpack.packb([0.0, [event], 0])
            parent = names[-1]
            stored += count


def _removals(names: Sequence[int]) -> Iterator[bytes]:
    for name in names:
        yield msgpack.packb(
            [0.0, [{"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU", "group_idx": 0}], 0]
        )


def _grown(make: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `make`, and by how many bytes the process grew."""
    gc.collect()
    before = _resident()
    made = make()
    gc.collect()
    return made, _resident() - before


def measure(blocks: int, size: int = 16) -> dict[str, float]:
    """Microseconds and bytes for each block."""
    held = EngineBlocks(size)
    spent = 0.0

    def fill() -> None:
        nonlocal spent
        for _, payload in _stores(blocks, size, random.Random(1)):
            started = time.perf_counter()
            held.apply(decode(payload))
            spent += time.perf_counter() - started

    _, grown = _grown(fill)
    stored = held.physical
    names = [name for some, _ in _stores(blocks, size, random.Random(1)) for name in some]
    removals = list(_removals(names[: stored // 2]))
    started = time.perf_counter()
    for payload in removals:
        held.apply(decode(payload))
    removing = time.perf_counter() - started
    started = time.perf_counter()
    listed = sum(1 for _ in held.blocks())
    listing = time.perf_counter() - started
    rng = random.Random(2)

    def linked() -> dict[int, tuple[bytes, bytes | None, bytes]]:
        made: dict[int, tuple[bytes, bytes | None, bytes]] = {}
        parent: bytes | None = None
        for _ in range(stored):
            key = rng.randbytes(16)
            made[rng.getrandbits(64)] = (key, parent, pack_tokens([rng.randrange(128_000) for _ in range(size)]))
            parent = key
        return made

    _, other = _grown(linked)
    return {
        "store_us": spent / stored * 1e6,
        "remove_us": removing / (stored // 2) * 1e6,
        "list_us": listing / listed * 1e6,
        "bytes": grown / stored,
        "bytes_with_tokens_instead": other / stored,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    figures = measure(options.blocks, options.block_size)
    if options.json:
        sys.stdout.write(orjson.dumps(figures).decode() + "\n")
    else:
        for name, value in figures.items():
            sys.stdout.write(f"{name:<28}{value:10.2f}\n")


if __name__ == "__main__":
    main()
