from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvcache.feed import Load, Snapshot, WorkerInfo
from kvcache.keys import KEY_SCHEME, BlockKey, PrefixKeys, block_keys, pack_tokens
from kvcache.profiles import LatencyModel
from router.core.decision import Decision, RouteRequest
from router.core.fleet import Fleet, FleetConfig, Ticket

BLOCK = 4
"""Tokens of a block: few, so that the prompts in tests are readable."""
CAPACITY = 10_000
LATENCY = LatencyModel(prefill_base=0.005, prefill_block=0.0025, prefill_cached=0.0005, decode=0.015, block_size=BLOCK)


def url_of(number: int) -> str:
    return f"http://worker-{number}:8000"


def info(worker_id: str = "w0", epoch: int = 1, **changes: object) -> WorkerInfo:
    fields: dict[str, object] = {
        "worker_id": worker_id,
        "epoch": epoch,
        "model": "m",
        "block_size": BLOCK,
        "fingerprint": "f" * 32,
        "key_scheme": KEY_SCHEME,
        "capacity": CAPACITY,
    }
    return WorkerInfo(**(fields | changes))  # type: ignore[arg-type]


def idle(blocks: int = CAPACITY) -> Load:
    return Load(free_blocks=blocks, total_blocks=blocks)


def snapshot(
    who: WorkerInfo | None = None, seq: int = 0, keys: Iterable[BlockKey] = (), load: Load | None = None
) -> Snapshot:
    return Snapshot(who or info(), seq, load or idle(), tuple((key, None) for key in keys))


def tokens(blocks: int, start: int = 0) -> list[int]:
    """`blocks` full blocks and one token more, so that all of the full ones may be reused."""
    return [start + i for i in range(blocks * BLOCK + 1)]


def keys_of(prompt: Sequence[int]) -> list[BlockKey]:
    return block_keys(prompt, BLOCK)


def ask(prompt: Sequence[int], *, streaming: bool = True, model: str | None = None, output: int = 0) -> RouteRequest:
    return RouteRequest(PrefixKeys(pack_tokens(prompt), BLOCK), len(prompt), streaming, model, output)


def config(**changes: object) -> FleetConfig:
    fields: dict[str, object] = {"block_size": BLOCK, "fingerprint": "f" * 32, "latency": LATENCY}
    return FleetConfig(**(fields | changes))  # type: ignore[arg-type]


MakeFleet = Callable[..., Fleet]


def send(fleet: Fleet, request: RouteRequest, now: float) -> tuple[Decision, Ticket]:
    decision = fleet.choose(request, now)
    return decision, fleet.dispatch(decision, request, now)


def hold(fleet: Fleet, number: int, prompt: list[int], blocks: int, seq: int = 1) -> None:
    """Worker `number` holds the first `blocks` blocks of the prompt, and nothing else."""
    fleet.apply_snapshot(url_of(number), snapshot(info(f"w{number}"), seq, keys_of(prompt)[:blocks]), 0.0)
