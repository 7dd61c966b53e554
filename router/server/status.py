"""`GET /status`: how this router is doing, for the controller and for people. docs/router.md names the fields."""

from __future__ import annotations

from typing import Any

from router.core.decision import RecentDecisions
from router.core.fleet import Fleet
from router.discovery.sources import DiscoveryStatus
from router.metrics import Metrics, by_label, total
from router.server.tokenizer_loader import TokenizerStatus


def status_page(
    fleet: Fleet,
    recent: RecentDecisions,
    metrics: Metrics,
    discovery: DiscoveryStatus,
    tokenizer: TokenizerStatus,
    *,
    draining: bool,
    now: float,
) -> dict[str, Any]:
    """Counts are since the start of the process and are the metrics' own: nothing is counted twice."""
    workers = fleet.workers(now)
    ready = [worker for worker in workers if worker.ready]
    return {
        "strategy": fleet.config.strategy,
        "draining": draining,
        "workers": {
            "known": len(workers),
            "ready": len(ready),
            "matching": sum(worker.matching for worker in ready),
        },
        "view_age_seconds": max((worker.view_age for worker in ready if worker.view_age is not None), default=None),
        "prompt_tokens": int(total(metrics.reported_prompt)),
        "cached_tokens": int(total(metrics.actual_cached)),
        "decisions": {reason: int(count) for reason, count in by_label(metrics.decisions).items()},
        "recent": [
            {
                "age_seconds": age,
                "worker_id": decision.worker_id,
                "reason": decision.reason.value,
                "matched_blocks": decision.matched_blocks,
                "prompt_blocks": decision.prompt_blocks,
                "predicted_ttft_seconds": decision.predicted_ttft,
            }
            for age, decision in recent.newest_first(now)
        ],
        "discovery": discovery.public(),
        "tokenizer": tokenizer.public(),
        "reuse_score": {worker.worker_id: worker.reuse_score for worker in workers},
    }
