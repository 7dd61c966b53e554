"""An agent that follows all data-parallel ranks of an engine: an emulated worker that publishes vLLM's KV events over
ZMQ, a port for each rank, in this process.

Covers: the view of each rank, ranks that come and go with a restart, engines whose first rank is not 0, and a number of
ranks that is not the expected one. Compared with a vLLM of two ranks: docs/vllm.md. Not covered: the events themselves
(test_agent.py) and routers (tests/router/test_ranks.py).
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from kvcache.tokens.tokenizer import Tokenizer
from tests.processes import eventually
from tests.worker.agent.beside import beside
from worker.kv_events import rank_endpoint

pytestmark = pytest.mark.looptime(False)


async def test_each_rank_has_a_feed_of_its_own(tokenizer: Tokenizer) -> None:
    async with beside(tokenizer, 2) as run:
        await run.ask(1, range(1, 100))  # before the agent follows: it asks for what it missed
        await eventually(lambda: not run.agent.problem, "the agent follows")
        assert len(run.agent.ranks) == 2
        for rank, start in itertools.product(range(2), (1000, 2000)):
            await run.ask(rank, range(start, start + 100 + 50 * rank))
        for rank, blocks in enumerate((12, 24)):
            await run.agrees(rank)
            info = (snapshot := await run.snapshot(rank)).info
            assert len(snapshot.blocks) == blocks
            assert (info.worker_id, info.rank, info.ranks) == (f"pod/{rank}", rank, 2)
            assert info.capacity == run.worker.ranks[rank].engine.config.blocks
        assert (await run.client.get("/cache/state?rank=2")).status == 404
        text = (await run.client.get("/metrics")).text
        assert "kvcluster_agent_ranks 2.0" in text
        assert "kvcluster_agent_blocks 36.0" in text


async def test_a_number_of_ranks_that_is_not_the_expected_one(tokenizer: Tokenizer) -> None:
    async with beside(tokenizer, 2, data_parallel_size=3) as run:
        await eventually(lambda: "there are 3" in run.agent.problem, "the agent has asked")
        reply = await run.client.get("/cache/state")
        assert (reply.status, "AGENT_DATA_PARALLEL_SIZE" in reply.text) == (503, True)


async def test_ranks_come_and_go_with_the_engine(tokenizer: Tokenizer) -> None:
    async with beside(tokenizer, 3) as run:
        await eventually(lambda: not run.agent.problem, "the agent follows three ranks")
        first = [rank.view.feed.epoch for rank in run.agent.ranks]
        run.engine.shown = {0}
        await eventually(lambda: len(run.agent.ranks) == 1 and not run.agent.problem, "one is left")
        (rank,) = run.agent.ranks
        assert (rank.view.state.info.worker_id, rank.view.state.info.ranks) == ("pod", 1)
        assert rank.view.feed.epoch > first[0]
        run.engine.shown = None
        await eventually(lambda: len(run.agent.ranks) == 3 and not run.agent.problem, "all are back")
        await run.ask(2, range(1, 100))
        await run.agrees(2)


async def test_an_engine_that_is_not_the_first_of_its_deployment(tokenizer: Tokenizer) -> None:
    """A server of vLLM's external load balancing: one engine, whose number its ports follow."""
    async with beside(tokenizer, 3) as run:
        run.engine.shown = {2}
        await eventually(lambda: len(run.agent.ranks) == 1 and not run.agent.problem, "the agent follows")
        await run.ask(0, range(1, 100))
        await run.ask(2, range(1000, 1100))
        held = Counter(key for key, _ in run.worker.ranks[2].engine.blocks())
        await eventually(
            lambda: Counter(key for key, _ in run.agent.ranks[0].view.blocks()) == held, "it is that engine's view"
        )


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://127.0.0.1:5557", 3, "tcp://127.0.0.1:5560"),
        ("tcp://[::1]:5557", 1, "tcp://[::1]:5558"),
        ("tcp://*:0", 3, "tcp://*:0"),
        ("inproc://cache", 2, "inproc://cache_dp2"),
        ("ipc:///tmp/cache", 2, "ipc:///tmp/cache"),
    ],
)
def test_the_endpoint_of_a_rank(endpoint: str, rank: int, expected: str) -> None:
    assert rank_endpoint(endpoint, 0) == endpoint
    assert rank_endpoint(endpoint, rank) == expected
