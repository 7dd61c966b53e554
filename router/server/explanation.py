"""The answer of `POST /route/explain`: a decision with everything that it was made of (docs/router.md)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from kvcache.keys import BYTES_PER_TOKEN, PrefixKeys
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError
from router.core.decision import Candidate, Decision, RouteRequest
from router.core.fleet import WorkerStatus

NAMED = 16
"""Holders of a run of blocks that are named; the others are counted."""
TEXTS = 1024
"""Blocks whose text is given, from the first on."""


def explanation(
    decision: Decision, route: RouteRequest, workers: Sequence[WorkerStatus], block_size: int, texts: list[str] | None
) -> dict[str, Any]:
    """The decision, what each candidate would cost, who holds which blocks, and why each other worker was left out.
    `texts`: those of the blocks, if they are known."""
    why_not = {worker.url: worker.why_not_matching for worker in workers}
    chosen = asdict(decision)
    del chosen["candidates"]
    chosen["prompt_tokens"] = route.prompt_tokens
    chosen["unread"] = route.unread
    return {
        "decision": chosen,
        "candidates": [_candidate(candidate, why_not[candidate.url]) for candidate in decision.candidates],
        "blocks": {
            "size": block_size,
            "runs": block_runs(decision.candidates, decision.prompt_blocks),
            "texts": texts,
        },
        "left_out": [
            {
                "worker": worker.worker_id,
                "state": worker.state,
                "why": worker.why_not_ready,
                "seconds_left": worker.state_until,
            }
            for worker in workers
            if not worker.ready
        ],
    }


def _candidate(candidate: Candidate, why_not_matching: str) -> dict[str, Any]:
    return {
        "worker": candidate.worker_id,
        **candidate._asdict(),
        "cost_parts": {
            "queue": candidate.queue_seconds,
            "load": candidate.load_seconds,
            "prefill": candidate.prefill_seconds,
            "decode": candidate.decode_cost,
            "charge": candidate.charge_seconds,
        },
        "matching": not why_not_matching,
        "why_not_matching": why_not_matching,
    }


def block_runs(candidates: Iterable[Candidate], blocks: int) -> list[dict[str, Any]]:
    """Who holds which of the prompt's `blocks`: runs with the same holders, from the block `from` up to, not including,
    `to`, counted from 0. Whoever can reuse a block can reuse all before it."""
    holders = sorted((each for each in candidates if each.matched_blocks), key=lambda each: each.matched_blocks)
    runs, start = [], 0
    for at, candidate in enumerate(holders):
        end = min(candidate.matched_blocks, blocks)
        if end > start:
            runs.append(_run(start, end, holders[at:]))
            start = end
    if start < blocks:
        runs.append(_run(start, blocks, ()))
    return runs


def _run(start: int, end: int, holders: Sequence[Candidate]) -> dict[str, Any]:
    named = [holder.worker_id for holder in holders[:NAMED]]
    return {"from": start, "to": end, "workers": named, "holders": len(holders)}


def block_texts(keys: PrefixKeys, tokenizer: Tokenizer, block_size: int) -> list[str] | None:
    """The text of each of the first `TEXTS` blocks of a prompt, special tokens included; None if its tokens are not all
    the tokenizer's. A character that two blocks share is U+FFFD in both."""
    packed = keys.packed[: TEXTS * block_size * BYTES_PER_TOKEN]
    tokens = struct.unpack(f"<{len(packed) // BYTES_PER_TOKEN}I", packed)
    try:
        return [
            tokenizer.decode(tokens[start : start + block_size], skip_special_tokens=False)
            for start in range(0, len(tokens), block_size)
        ]
    except TokenizerError:
        return None
