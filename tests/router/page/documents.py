"""Live documents for tests of the page: fleets of any size that look like real ones, and each state of a fleet."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

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

NOW = 1_764_288_000.0
"""Unix seconds: 2025-11-28 00:00 UTC."""
STEP = 5.0
SPAN = 900

TROUBLES: tuple[tuple[WorkerPhase, bool, str, Trust], ...] = (
    (WorkerPhase.UNREACHABLE, False, "it refuses connections", Trust.EXACT),
    (WorkerPhase.EJECTED, False, "5 of its last 5 requests failed: it gets none for 30 s", Trust.EXACT),
    (WorkerPhase.PAUSED, False, "it turned a request away", Trust.EXACT),
    (WorkerPhase.HALF_OPEN, True, "5 of its last 5 requests failed: a probe is under way", Trust.EXACT),
    (
        WorkerPhase.SERVING,
        True,
        "its blocks have 32 tokens and those of the router 16: start the router with --block-size 32",
        Trust.NONE,
    ),
    (WorkerPhase.DRAINING, False, "it is terminating: chosen only when there is no other", Trust.EXACT),
    (WorkerPhase.STARTING, False, "it has not been heard from yet", Trust.NONE),
    (WorkerPhase.CLOSED, False, "it is terminating or not ready", Trust.EXACT),
    (WorkerPhase.AGENT, False, "it is the cache agent of http://10.0.0.9:8000, which takes no requests", Trust.NONE),
)
"""State, ready, problem, trust: one of each kind that is shown differently."""


def worker(number: int, rng: random.Random, **fields: Any) -> WorkerLive:
    """A worker that serves, unless `fields` say otherwise."""
    name = f"rag-worker-{number}"
    capacity = 16_384
    fill = min(1.0, rng.uniform(0.35, 1.1))
    base = WorkerLive(
        url=f"http://10.0.{number // 250}.{number % 250 + 1}:8000",
        worker_id=name,
        pod=name,
        state=WorkerPhase.SERVING,
        ready=True,
        problem=None,
        running=rng.randrange(0, 9),
        waiting=max(0, rng.randrange(-6, 4)),
        cache_fill=fill,
        blocks=int(fill * capacity),
        capacity=capacity,
        view_age_seconds=rng.uniform(0.0, 1.4),
        trust=Trust.EXACT,
        hit_rate=rng.uniform(0.55, 0.93),
        reuse_score=rng.uniform(40, 8_000),
        in_flight=rng.randrange(0, 9),
        requests=rng.randrange(500, 9_000),
    )
    return replace(base, **fields)


def troubled(number: int, kind: int, rng: random.Random) -> WorkerLive:
    """A worker with the trouble of this number."""
    state, ready, problem, trust = TROUBLES[kind % len(TROUBLES)]
    silent = state in (WorkerPhase.STARTING, WorkerPhase.AGENT)
    known: dict[str, Any] = {}
    if silent:
        known = {"running": None, "waiting": None, "cache_fill": None, "blocks": 0, "capacity": 0}
        known |= {"view_age_seconds": None, "hit_rate": None, "reuse_score": 0.0, "in_flight": 0, "requests": 0}
    return worker(number, rng, state=state, ready=ready, problem=problem, trust=trust, **known)


def router(name: str = "rag-router-0", url: str = "", **fields: Any) -> RouterLive:
    """A router that serves, unless `fields` say otherwise."""
    base = RouterLive(
        name=name,
        url=url,
        state=RouterPhase.SERVING,
        ready=True,
        strategy="cache_aware",
        uptime_seconds=5_400.0,
        tokenizer="loaded",
        discovery=DiscoveryLive("kubernetes", 2.0, None),
    )
    return replace(base, **fields)


def history(rng: random.Random, steps: int = int(SPAN / STEP), gap: range = range(100, 112)) -> History:
    """Fifteen minutes; without values in the steps of `gap`."""

    def walk(low: float, high: float) -> tuple[float | None, ...]:
        value, values = rng.uniform(low, high), []
        for step in range(steps):
            value = min(high, max(low, value + rng.gauss(0, (high - low) / 14)))
            values.append(None if step in gap else value)
        return tuple(values)

    p50, t50 = walk(0.028, 0.06), walk(0.017, 0.024)
    return History(
        step_seconds=STEP,
        at=tuple(int(NOW - (steps - 1 - step) * STEP) for step in range(steps)),
        requests_per_second=walk(12, 22),
        hit_rate=walk(0.7, 0.88),
        ttft_p50=p50,
        ttft_p95=tuple(None if value is None else value * rng.uniform(1.9, 3.2) for value in p50),
        tpot_p50=t50,
        tpot_p95=tuple(None if value is None else value * rng.uniform(1.3, 1.8) for value in t50),
        load_skew=walk(1.0, 1.7),
        prefill_seconds_saved=tuple(None if value is None else value * STEP for value in walk(1.1, 2.0)),
    )


def decision(number: int, rng: random.Random, workers: int, **fields: Any) -> DecisionLive:
    """The decision of this number, a second and a bit after the one before."""
    blocks = rng.randrange(8, 160)
    reason = rng.choices(
        [DecisionReason.PREFIX_MATCH, DecisionReason.LOAD_OVER_PREFIX, DecisionReason.NO_MATCH], [8, 2, 1]
    )[0]
    matched = 0 if reason is DecisionReason.NO_MATCH else rng.randrange(1, blocks)
    queue, prefill = max(0.0, rng.gauss(0.004, 0.008)), 0.0018 * (blocks - matched) + 0.009
    base = DecisionLive(
        id=f"instance:{number}",
        at=NOW + number * 1.3 - 130,
        router="rag-router-0",
        worker_id=f"rag-worker-{rng.randrange(max(workers, 1))}",
        reason=reason,
        matched_blocks=matched,
        prompt_blocks=blocks,
        predicted_ttft_seconds=queue + prefill,
        queue_seconds=queue,
        load_seconds=0.0,
        prefill_seconds=prefill,
        decode_seconds=rng.uniform(0.001, 0.02),
        charge_seconds=max(0.0, rng.gauss(0.0, 0.01)),
    )
    return replace(base, **fields)


def fleet(workers: int = 4, troubles: int = 0, *, seed: int = 1, decisions: int = 6) -> Live:
    """A fleet that has served for hours. The first `troubles` workers have a trouble each, of every kind in turn."""
    rng = random.Random(seed)
    known = [troubled(n, n, rng) if n < troubles else worker(n, rng) for n in range(workers)]
    return Live(
        at=NOW,
        routers=(router(),),
        workers=tuple(sorted(known, key=lambda each: each.url)),
        totals=Totals(
            requests=184_213,
            errors=0,
            prompt_tokens=412_000_000,
            cached_tokens=337_000_000,
            hit_rate=337 / 412,
            prefill_seconds_saved=8_412.0,
            gpus_saved=1.62,
            since_seconds=5_400.0,
        ),
        history=history(rng),
        decisions=tuple(decision(99 - n, rng, workers) for n in range(decisions)),
    )


def deployed(workers: int, troubles: int, decisions: int = 6) -> Live:
    """The same fleet, with names as pods of a Deployment have them, which differ at their end alone."""
    live = fleet(workers, troubles, decisions=decisions)
    names = {each.worker_id: pod_name(number) for number, each in enumerate(live.workers)}
    return replace(
        live,
        workers=tuple(replace(each, worker_id=(name := names[each.worker_id]), pod=name) for each in live.workers),
        decisions=tuple(replace(each, worker_id=names[each.worker_id]) for each in live.decisions),
    )


def pod_name(number: int) -> str:
    """The name of a pod, random at its end as Kubernetes makes it."""
    end = "".join(random.Random(number).choices("bcdfghjklmnpqrstvwxz2456789", k=5))
    return f"assistant-llama-3-70b-worker-{'7c9f8d6b5' if number % 5 else '5d4c7b9f6'}-{end}"


def empty(source: str = "static", error: str | None = None) -> Live:
    """A router that knows no worker."""
    unready = router(
        "laptop",
        ready=False,
        reason="no worker is known",
        uptime_seconds=12.0,
        discovery=DiscoveryLive(source, None, error),
    )
    nothing = Totals(0, 0, 0, 0, None, 0.0, None, 12.0)
    return Live(at=NOW, routers=(unready,), workers=(), totals=nothing, history=History(step_seconds=STEP))


def unused(workers: int = 4) -> Live:
    """A fleet that is ready and has had no request."""
    return replace(fleet(workers), totals=empty().totals, history=History(step_seconds=STEP), decisions=())


def starting(workers: int = 4) -> Live:
    """A fleet of which no worker has been heard from."""
    rng = random.Random(2)
    routers = (router(ready=False, reason="no worker is ready", uptime_seconds=4.0, tokenizer="loading"),)
    started = tuple(troubled(n, 6, rng) for n in range(workers))
    return replace(empty("kubernetes"), routers=routers, workers=started)


def down(workers: int = 4) -> Live:
    """A fleet that has served, and of which no worker can be reached any more."""
    rng = random.Random(3)
    lost = tuple(troubled(n, 0, rng) for n in range(workers))
    return replace(fleet(workers), workers=lost, routers=(router(ready=False, reason="no worker is ready"),))


def queueing(waiting: int = 37, held: int = 0) -> Live:
    """A fleet whose routers hold requests back: so many of the middle class, `held` of them because no worker is
    ready; 0: there is room."""
    oldest = 4.2 if waiting else None
    return replace(
        fleet(4),
        queues=(
            QueueLive("interactive", 10, 0, 0, None, 0),
            QueueLive("standard", 0, waiting, held, oldest, 0),
            QueueLive("batch", -10, waiting * 40, held * 40, 28.0 if waiting else None, 312),
        ),
    )


def several_routers() -> Live:
    """Three routers, of which one cannot be reached and one has lost its list of workers."""
    lost_list = DiscoveryLive("kubernetes", 312.0, "the API server does not answer: connection refused")
    return replace(
        fleet(6, 0),
        routers=(
            router("rag-router-7c9f-x2x9q"),
            router("rag-router-7c9f-k8k2m", "http://10.1.0.8:9000", discovery=lost_list, tokenizer="failed"),
            RouterLive(
                name="rag-router-7c9f-zz11p",
                url="http://10.1.0.9:9000",
                state=RouterPhase.UNREACHABLE,
                reason="its management port does not answer: timed out after 1 s",
            ),
        ),
    )


SCRIPT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
"""What must stay text wherever it comes from."""


def hostile() -> Live:
    """Every text that others write is markup."""
    live = fleet(3, 0)
    workers = tuple(
        replace(each, worker_id=f"{SCRIPT}{n}", pod=SCRIPT, problem=SCRIPT) for n, each in enumerate(live.workers)
    )
    decisions = tuple(replace(each, worker_id=SCRIPT, reason=SCRIPT, router=SCRIPT) for each in live.decisions[:5])
    bad_list = DiscoveryLive(SCRIPT, 1.0, SCRIPT)
    routers = tuple(
        router(f"{SCRIPT}{n}", reason=SCRIPT, strategy=SCRIPT, tokenizer=SCRIPT, discovery=bad_list) for n in range(2)
    )
    return replace(live, workers=workers, decisions=decisions, routers=routers)
