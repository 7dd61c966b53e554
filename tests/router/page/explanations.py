"""Answers of `POST /route/explain` for tests of the page."""

from __future__ import annotations

from typing import Any


def candidate(name: str, matched: int, blocks: int, **fields: Any) -> dict[str, Any]:
    """What a request of so many blocks would cost on a worker that holds `matched` of them."""
    made: dict[str, Any] = {
        "worker_id": name,
        "url": f"http://{name}:8000",
        "matched_blocks": matched,
        "loaded_blocks": {},
        "queue_seconds": 0.0,
        "load_seconds": 0.0,
        "prefill_seconds": 0.009 + 0.0018 * (blocks - matched),
        "slowdown_seconds": 0.003,
        "charge_seconds": 0.0,
        "in_flight": 2,
        "matching": True,
        "why_not_matching": "",
        **fields,
    }
    parts = ("queue_seconds", "load_seconds", "prefill_seconds", "slowdown_seconds", "charge_seconds")
    return {**made, "cost": sum(made[part] for part in parts)}


def explanation(**decision: Any) -> dict[str, Any]:
    """A prompt of 64 blocks that two workers hold in part; the one with the longer match has a queue."""
    candidates = [
        candidate("rag-worker-0", 40, 64, queue_seconds=0.004, charge_seconds=-0.006),
        candidate("rag-worker-1", 56, 64, queue_seconds=0.081, in_flight=9),
        candidate("rag-worker-2", 24, 64, loaded_blocks={"cpu": 8}, load_seconds=0.006, charge_seconds=0.02),
        candidate(
            "rag-worker-3", 0, 64, charge_seconds=0.041, in_flight=0, why_not_matching="its cache feed is silent"
        ),
    ]
    chosen = candidates[0]
    return {
        "decision": {
            "worker_id": chosen["worker_id"],
            "url": chosen["url"],
            "strategy": "cache_aware",
            "reason": "load_over_prefix",
            "matched_blocks": chosen["matched_blocks"],
            "prompt_blocks": 64,
            "prompt_tokens": 1_020,
            "predicted_ttft": chosen["queue_seconds"] + chosen["prefill_seconds"],
            "unread": None,
            **decision,
        },
        "candidates": candidates,
        "left_out": [
            {
                "worker": "rag-worker-4",
                "state": "ejected",
                "why": "5 of its last 5 requests failed",
                "seconds_left": 12.0,
            }
        ],
    }
