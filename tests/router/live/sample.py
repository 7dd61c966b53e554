"""Live documents for tests of what shows them, with every state that a router or worker can be in."""

from __future__ import annotations

import random

from router.core.decision import DecisionReason
from router.core.view import Trust
from router.core.worker_state import WorkerPhase
from router.live.document import (
    DecisionLive,
    DiscoveryLive,
    History,
    Live,
    QueueLive,
    RouterLive,
    RouterPhase,
    Totals,
    WorkerLive,
)

AT = 1_790_000_000.0
"""When sample documents are of."""
HOSTILE = '<script>alert("1")</script>'
"""A name that is markup, where text is asked for."""

_PROBLEMS = {
    WorkerPhase.STARTING: "it has not been heard from yet",
    WorkerPhase.PAUSED: "it turned a request away",
    WorkerPhase.EJECTED: "5 failures in a row",
    WorkerPhase.HALF_OPEN: "5 failures in a row",
    WorkerPhase.DRAINING: "it is terminating: chosen only when there is no other",
    WorkerPhase.CLOSED: "it is terminating or not ready",
    WorkerPhase.UNREACHABLE: "it has been silent for more than 2 s",
    WorkerPhase.AGENT: "http://10.0.0.9:5558 is a cache agent, which takes no requests",
}


def live(workers: int = 4, routers: int = 2, steps: int = 180, decisions: int = 20, seed: int = 0) -> Live:
    """A document of so many. From 12 workers on, one is in each state; the last router of several is unreachable, and
    the name of the last worker is `HOSTILE`."""
    rng = random.Random(seed)
    tiles = tuple(_worker(index, workers, rng) for index in range(workers))
    return Live(
        at=AT,
        routers=tuple(_router(index, routers) for index in range(routers)),
        workers=tuple(sorted(tiles, key=lambda worker: worker.url)),
        totals=Totals(
            requests=120_431,
            errors=12,
            prompt_tokens=174_000_000,
            cached_tokens=66_120_000,
            hit_rate=0.38,
            prefill_seconds_saved=8_731.5,
            gpus_saved=2.4,
            since_seconds=3_600.0,
        ),
        history=_history(steps, rng),
        decisions=tuple(_decision(index, tiles, rng) for index in range(decisions)) if tiles else (),
        queues=(
            QueueLive("interactive", 10, 0, 0, None, 0),
            QueueLive("standard", 0, 12, 2, 4.2, 0),
            QueueLive(HOSTILE, -10, 340, 0, 28.0, 41),
        ),
    )


def _router(index: int, routers: int) -> RouterLive:
    url = "" if index == 0 else f"http://10.0.1.{index}:9000"
    if index and index == routers - 1:
        return RouterLive(url, url, RouterPhase.UNREACHABLE, reason="it did not answer within 2 s")
    return RouterLive(
        name=f"rag-router-{index}",
        url=url,
        state=RouterPhase.SERVING,
        ready=True,
        reason=None,
        strategy="cache_aware",
        uptime_seconds=3_600.0 - index,
        tokenizer="loaded",
        discovery=DiscoveryLive("kubernetes", 0.4, None),
    )


def _worker(index: int, workers: int, rng: random.Random) -> WorkerLive:
    phases = [phase for phase in WorkerPhase if phase is not WorkerPhase.GONE]
    phase = phases[index] if workers >= 12 and index < len(phases) else WorkerPhase.SERVING
    served = phase not in (WorkerPhase.STARTING, WorkerPhase.AGENT)
    hostile = index == workers - 1 and workers > 1
    fill = rng.random() if served else None
    return WorkerLive(
        url=f"http://10.0.{2 + index // 250}.{1 + index % 250}:8000",
        worker_id=HOSTILE if hostile else f"rag-worker-{index}",
        pod="" if hostile else f"rag-worker-{rng.randrange(16**5):05x}",
        state=phase,
        ready=phase is WorkerPhase.SERVING,
        problem=_PROBLEMS.get(phase),
        running=rng.randrange(32) if served else None,
        waiting=rng.choice((0, 0, 0, 3)) if served else None,
        cache_fill=fill,
        blocks=round(4_000 * (fill or 0.0)),
        capacity=4_000 if served else 0,
        view_age_seconds=float(rng.randrange(2)) if served else None,
        trust=Trust.EXACT if served else Trust.NONE,
        hit_rate=round(rng.random(), 3) if served else None,
        reuse_score=float(rng.randrange(5_000)),
        in_flight=rng.randrange(32) if served else 0,
        requests=rng.randrange(40_000) if served else 0,
    )


def _history(steps: int, rng: random.Random) -> History:
    def series(low: float, high: float) -> tuple[float | None, ...]:
        return tuple(None if 40 <= step < 44 else round(rng.uniform(low, high), 4) for step in range(steps))

    return History(
        step_seconds=5.0,
        at=tuple(int(AT) - 5 * (steps - 1 - step) for step in range(steps)),
        requests_per_second=series(30, 60),
        hit_rate=series(0.3, 0.45),
        ttft_p50=series(0.05, 0.08),
        ttft_p95=series(0.2, 0.9),
        tpot_p50=series(0.012, 0.014),
        tpot_p95=series(0.02, 0.05),
        load_skew=series(1.0, 1.8),
        prefill_seconds_saved=series(5, 20),
    )


def _decision(index: int, workers: tuple[WorkerLive, ...], rng: random.Random) -> DecisionLive:
    queue, load, prefill = (round(rng.random() * scale, 4) for scale in (0.2, 0.01, 0.4))
    blocks = rng.randrange(1, 200)
    return DecisionLive(
        id=f"5f3c:{1_000 - index}",
        at=AT - 0.3 * index,
        router="rag-router-0",
        worker_id=rng.choice(workers).worker_id,
        reason=rng.choice(list(DecisionReason)).value,
        matched_blocks=rng.randrange(blocks),
        prompt_blocks=blocks,
        predicted_ttft_seconds=queue + load + prefill,
        queue_seconds=queue,
        load_seconds=load,
        prefill_seconds=prefill,
        decode_seconds=round(rng.random() * 0.1, 4),
        charge_seconds=round(rng.uniform(-0.05, 0.2), 4),
    )
