"""Answers of `POST /route/explain` for tests of the page."""

from __future__ import annotations

from typing import Any


def candidate(name: str, matched: int, blocks: int, **parts: float) -> dict[str, Any]:
    """What a request of so many blocks would cost on a worker that holds `matched` of them; `parts`: of the cost."""
    computed = 0.009 + 0.0018 * (blocks - matched)
    cost_parts = {"queue": 0.0, "load": 0.0, "prefill": computed, "decode": 0.003, "charge": 0.0, **parts}
    return {
        "worker_id": name,
        "url": f"http://{name}:8000",
        "matched_blocks": matched,
        "loaded_blocks": {},
        "cost_parts": cost_parts,
        "cost": sum(cost_parts.values()),
        "in_flight": 2,
        "why_not_matching": "",
    }


def explanation(**decision: Any) -> dict[str, Any]:
    """A prompt of 64 blocks that three workers hold in part; the one with the longest match has a queue."""
    candidates = [
        candidate("rag-worker-0", 40, 64, queue=0.004, charge=-0.006),
        candidate("rag-worker-1", 56, 64, queue=0.081) | {"in_flight": 9},
        candidate("rag-worker-2", 24, 64, load=0.006, charge=0.02) | {"loaded_blocks": {"cpu": 8}},
        candidate("rag-worker-3", 0, 64, charge=0.041) | {"why_not_matching": "its cache feed is silent"},
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
            "predicted_ttft": 0.056,
            "unread": None,
            **decision,
        },
        "candidates": candidates,
        "blocks": {
            "size": 16,
            "runs": [
                {"from": 0, "to": 24, "workers": ["rag-worker-2", "rag-worker-0", "rag-worker-1"], "holders": 3},
                {"from": 24, "to": 40, "workers": ["rag-worker-0", "rag-worker-1"], "holders": 2},
                {"from": 40, "to": 56, "workers": ["rag-worker-1"], "holders": 1},
                {"from": 56, "to": 64, "workers": [], "holders": 0},
            ],
            "texts": [f"These are the words of block {block}, which end in " for block in range(60)],
        },
        "left_out": [
            {
                "worker": "rag-worker-4",
                "state": "ejected",
                "why": "5 of its last 5 requests failed",
                "seconds_left": 12.0,
            }
        ],
    }
