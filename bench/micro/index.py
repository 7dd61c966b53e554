"""The time of one decision, and of one stored or removed block: `python -m bench.micro.index [--json]`.

Eight workers hold 27,000 blocks each, some of them in common. Prompts of 4,096 and 131,072 tokens, of which nothing,
half or everything is cached on some worker, are decided and dispatched. The keys of the prompt are new for each
decision, so hashing the prompt is included; tokenising it is not. Each figure is the median, in microseconds of wall
time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import orjson
from rich.console import Console
from rich.table import Column, Table

from kvcache.feed import Batch, Event, Load, Removed, Snapshot, Stored, WorkerInfo
from kvcache.keys import KEY_SCHEME, BlockKey, PrefixKeys, block_keys, pack_tokens
from kvcache.profiles import DEFAULT_PROFILE, profile
from router.core.decision import RouteRequest
from router.core.fleet import Fleet, FleetConfig

WORKERS = 8
BLOCKS = 27_000
BLOCK_SIZE = 16
PROMPTS = (4_096, 131_072)
CACHED = (0.0, 0.5, 1.0)
BATCH = 64
"""Blocks of one stored or removed event."""


def _url(number: int) -> str:
    return f"http://worker-{number}:8000"


def _batch(seq: int, event: Event) -> Batch:
    return Batch(1, seq, (event,), Load(free_blocks=BLOCKS, total_blocks=BLOCKS))


def _filled(prompt_keys: Sequence[BlockKey], held: Sequence[int], rng: random.Random) -> Fleet:
    """Worker n holds the first `held[n]` blocks of the prompt. The rest of every cache are other blocks, a quarter of a
    cache of which the next worker holds too."""
    fleet = Fleet(FleetConfig(block_size=BLOCK_SIZE, fingerprint="-", latency=profile(DEFAULT_PROFILE).latency))
    shared: list[BlockKey] = []
    for number, depth in enumerate(held):
        rest = BLOCKS - depth - len(shared)
        own = [rng.randbytes(16) for _ in range(rest)]
        keys = [*prompt_keys[:depth], *shared, *own]
        shared = own[: BLOCKS // 4]
        info = WorkerInfo(f"worker-{number}", 1, "m", BLOCK_SIZE, "-", KEY_SCHEME, BLOCKS)
        load = Load(free_blocks=BLOCKS, total_blocks=BLOCKS)
        fleet.add(_url(number))
        fleet.apply_snapshot(_url(number), Snapshot(info, 0, load, tuple((key, None) for key in keys)), 0.0)
    return fleet


def _median(rounds: int, run: Callable[[int], float]) -> float:
    return statistics.median(run(turn) for turn in range(rounds)) * 1e6


def _decisions(rounds: int, rng: random.Random) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for length in PROMPTS:
        tokens = [rng.randrange(50_000) for _ in range(length)]
        packed, keys = pack_tokens(tokens), block_keys(tokens, BLOCK_SIZE)
        for cached in CACHED:
            depth = int(cached * (len(keys) - 1))
            # Eight different depths: the most at which one search can split.
            fleet = _filled(keys, [depth * (WORKERS - n) // WORKERS for n in range(WORKERS)], rng)
            choose: list[float] = []
            dispatch: list[float] = []
            matched = 0
            for turn in range(rounds):
                now = turn * 1e-3  # within the time for which a view may be used
                request = RouteRequest(PrefixKeys(packed, BLOCK_SIZE), length, streaming=True)
                started = time.perf_counter()
                decision = fleet.choose(request, now)
                matched = matched or decision.matched_blocks  # of the first: a prompt that comes often is spread
                chosen = time.perf_counter()
                ticket = fleet.dispatch(decision, request, now)
                dispatch.append(time.perf_counter() - chosen)
                choose.append(chosen - started)
                ticket.release(now, reused=False)
            rows.append(
                {
                    "prompt_tokens": length,
                    "matched_blocks": matched,
                    "choose_us": round(statistics.median(choose) * 1e6, 1),
                    "dispatch_us": round(statistics.median(dispatch) * 1e6, 1),
                }
            )
    return rows


def _feed(rounds: int, rng: random.Random) -> dict[str, float]:
    fleet = _filled([], [0] * WORKERS, rng)
    seq = 0

    def apply(keys: Sequence[BlockKey], event: Event) -> float:
        nonlocal seq
        seq += 1
        message = _batch(seq, event)
        started = time.perf_counter()
        fleet.apply_batch(_url(0), message, 0.0)
        return (time.perf_counter() - started) / len(keys)

    runs = [tuple(rng.randbytes(16) for _ in range(BATCH)) for _ in range(rounds)]
    stored = _median(rounds, lambda turn: apply(runs[turn], Stored(None, runs[turn])))
    removed = _median(rounds, lambda turn: apply(runs[turn], Removed(runs[turn])))
    return {"stored_us_per_block": round(stored, 3), "removed_us_per_block": round(removed, 3)}


def measure(rounds: int, seed: int = 0) -> dict[str, object]:
    """All figures, each of `rounds` decisions or batches."""
    rng = random.Random(seed)
    return {
        "workers": WORKERS,
        "blocks_per_worker": BLOCKS,
        "block_size": BLOCK_SIZE,
        "decisions": _decisions(rounds, rng),
        "feed": _feed(rounds, rng),
    }


def _print(figures: dict[str, object]) -> None:
    rows = figures["decisions"]
    columns = (Column(name, justify="right") for name in ("prompt tokens", "matched blocks", "choose", "dispatch"))
    table = Table(*columns, title=f"Microseconds a decision, {WORKERS} workers with {BLOCKS:,} blocks each")
    for row in rows if type(rows) is list else []:
        table.add_row(*(f"{value:,}" for value in row.values()))
    console = Console()
    console.print(table)
    console.print(figures["feed"])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.index", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=200, help="decisions or batches for each figure (default: 200)")
    options = parser.parse_args(arguments)
    figures = measure(options.rounds)
    if options.json:
        sys.stdout.buffer.write(orjson.dumps(figures, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        _print(figures)


if __name__ == "__main__":
    main(sys.argv[1:])
