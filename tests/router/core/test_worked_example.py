"""docs/routing.md: its worked example, and that it names every reason and strategy.

Not covered: whether the rest of its text is true.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache.keys import PrefixKeys, block_keys, pack_tokens
from kvcache.profiles import DEFAULT_PROFILE, profile
from router.core.decision import Decision, DecisionReason, RouteRequest
from router.core.errors import RejectReason
from router.core.fleet import Fleet
from router.core.strategies import STRATEGIES
from tests.router.core.support import config, info, snapshot, url_of

DOC = (Path(__file__).parents[3] / "docs" / "routing.md").read_text(encoding="utf-8")
PROMPT = list(range(1608))


def ask(tokens: list[int]) -> RouteRequest:
    return RouteRequest(PrefixKeys(pack_tokens(tokens), 16), len(tokens), streaming=True, output_hint=200)


def decide(*, matches: int) -> Decision:
    """Where the request of the example goes if `matches` requests before it asked for the same 80 blocks."""
    fleet = Fleet(config(block_size=16, latency=profile(DEFAULT_PROFILE).latency))
    keys = block_keys(PROMPT, 16)
    for number, held in enumerate((80, 20, 0)):
        fleet.add(url_of(number))
        who = info(f"w{number}", block_size=16)
        fleet.apply_snapshot(url_of(number), snapshot(who, keys=keys[:held]), 0.0)
    for _ in range(matches):
        fleet.dispatch(fleet.choose(ask(PROMPT), 0.0), ask(PROMPT), 0.0).release(0.0, reused=False)

    def send(number: int, blocks: int, now: float) -> None:
        request = ask([50_000 + blocks] * (16 * blocks))
        others = {url_of(other) for other in range(3)} - {url_of(number)}
        ticket = fleet.dispatch(fleet.choose(request, now, others), request, now)
        if number:
            ticket.first_token(now + 0.03)

    send(1, 10, 0.5)
    send(0, 70, 1.0)
    send(0, 30, 1.0)
    return fleet.choose(ask(PROMPT), 1.04)


def test_the_worked_example() -> None:
    once, often, most = decide(matches=0), decide(matches=2), decide(matches=41)
    for one, popular, spread in zip(once.candidates, often.candidates, most.candidates, strict=True):
        charge = one.cost - one.queue_seconds - one.prefill_seconds - one.slowdown_seconds
        figures = (one.queue_seconds, one.prefill_seconds, one.slowdown_seconds, charge)
        costs = (one.cost, popular.cost, spread.cost)
        row = " | ".join(f"{abs(1e3 * seconds):.1f}" for seconds in figures + costs)
        assert f"| {one.worker_id} | {one.matched_blocks} | {row} |" in DOC
    assert (once.worker_id, once.reason, once.prompt_blocks) == ("w0", DecisionReason.PREFIX_MATCH, 101)
    assert (often.worker_id, often.reason) == ("w2", DecisionReason.LOAD_OVER_PREFIX)
    assert (most.worker_id, most.reason) == ("w2", DecisionReason.LOAD_OVER_PREFIX)
    for decision in (once, often, most):
        assert f"predicted {1e3 * decision.predicted_ttft:.1f} ms" in DOC


@pytest.mark.parametrize("name", [*DecisionReason, *RejectReason, *(f"### {name}" for name in STRATEGIES)])
def test_everything_that_has_a_name_is_documented(name: str) -> None:
    assert (name if name.startswith("#") else f"`{name}`") in DOC
