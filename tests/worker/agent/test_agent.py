"""The agent beside a fake engine over real sockets: late starts, gaps, restarts, and engines that fail or are absent.

Not covered: the agent's process (`test_process.py`), and a real vLLM (`tests/real_vllm`).
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from kvcache.feed import Load, decode_batch
from kvcache.keys import BlockKey, block_keys
from tests.processes import eventually
from tests.worker.agent.captures import NAMES, cached, messages
from tests.worker.agent.conftest import Running, Start
from tests.worker.agent.engine import CLEARED, FakeEngine, packed, payloads, removed, stored
from tests.worker.conftest import Reply

pytestmark = pytest.mark.process

A, B, C = (packed(stored([name], [name] * 16)) for name in (1, 2, 3))


def keys(*names: int) -> Counter[BlockKey]:
    return Counter(block_keys([name] * 16, 16)[0] for name in names)


async def follows(running: Running) -> None:
    await eventually(lambda: not running.agent.problem)


async def sees(running: Running, expected: Counter[BlockKey]) -> None:
    def same() -> bool:
        blocks = running.agent.ranks[0].view.follower.blocks
        return not running.agent.problem and Counter(key for key, _ in blocks.blocks()) == expected

    await eventually(same)
    assert await running.keys() == expected


@pytest.mark.parametrize("name", NAMES)
async def test_a_capture_that_was_published_before(name: str, beside: Start) -> None:
    captured = messages(name)
    async with FakeEngine() as engine:
        await engine.publish(*payloads(captured))
        async with beside(engine) as running:
            await sees(running, cached(captured))
            assert await running.metric("complete") == 1
            assert await running.metric("epochs_total", reason="connected") == 1
            assert engine.asked == [0]


async def test_the_figures_are_sums_over_what_the_engine_published(beside: Start) -> None:
    captured = messages("kv_events_small")
    types = Counter(event["type"] for message in captured for event in message.events)
    odd = packed(removed(1, 2), {"type": "Later"}, {"type": "BlockStored", "block_hashes": [7, 8, 9]})
    async with FakeEngine() as engine:
        await engine.publish(*payloads(captured), odd)
        async with beside(engine) as running:
            await sees(running, cached(captured))
            assert await running.metric("blocks") == cached(captured).total() > 0
            assert await running.metric("events_total", type="stored") == types["BlockStored"] > 0
            assert await running.metric("events_total", type="removed") == types["BlockRemoved"] + 1
            assert await running.metric("events_total", type="cleared") == types["AllBlocksCleared"]
            assert await running.metric("events_total", type="unknown") == 1
            assert await running.metric("events_total", type="unreadable") == 1
            assert await running.metric("dropped_blocks_total", reason="unreadable") == 3
            assert await running.metric("unknown_removals_total") == 2
            task, _ = await subscribed(running)
            assert await running.metric("feed_subscribers") == 1
            assert await running.metric("feed_resets_total") == 0
            await engine.stop()
            await asyncio.wait_for(task, 5)
            assert await running.metric("feed_subscribers") == 0


@pytest.mark.parametrize("topics_in_replay", [True, False])
async def test_a_capture_half_before_and_half_while_the_agent_runs(topics_in_replay: bool, beside: Start) -> None:
    captured = messages("kv_events_small")
    half = len(captured) // 2
    async with FakeEngine(topics_in_replay=topics_in_replay) as engine:
        await engine.publish(*payloads(captured[:half]))
        async with beside(engine) as running:
            await sees(running, cached(captured[:half]))
            before = (await running.snapshot()).info.epoch
            await engine.publish(*payloads(captured[half:]))
            await sees(running, cached(captured))
            snapshot = await running.snapshot()
            assert snapshot.info.epoch == before
            assert snapshot.seq == len(captured) - half
            assert await running.metric("gaps_total") == 0


async def test_the_description_of_the_worker(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        info = (await running.snapshot()).info
        assert (info.worker_id, info.model, info.block_size, info.capacity) == ("w", "tiny", 16, 100)
        assert (info.fingerprint, info.key_scheme) == ("f" * 32, "sha256-prefix-128")
        assert await running.health() == (200, '{"complete":true}')


async def test_a_gap_is_filled_from_the_replay(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        await engine.publish(A)
        await sees(running, keys(1))
        engine.lose(B, packed(removed(1)))
        engine.holes = {2}
        await engine.publish(C)
        await sees(running, keys(2, 3))
        assert engine.asked == [0, 1, 2]
        assert await running.metric("gaps_total") == 1
        assert await running.metric("replays_total", outcome="torn") == 1
        assert await running.metric("epochs_total", reason="history_lost") == 0


async def test_a_gap_of_which_the_history_is_lost_begins_an_epoch(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        await engine.publish(A)
        await sees(running, keys(1))
        epoch = (await running.snapshot()).info.epoch
        task, reply = await subscribed(running)
        engine.lose(packed(removed(1)))
        engine.forget()
        await engine.publish(B)
        await sees(running, keys(2))
        await asyncio.wait_for(task, 5)
        assert "event: reset" in reply.text
        assert (await running.snapshot()).info.epoch > epoch
        assert await running.metric("epochs_total", reason="history_lost") == 1
        assert await running.metric("complete") == (await running.snapshot()).info.complete == 0
        await engine.publish(packed(CLEARED), C)
        await sees(running, keys(3))
        assert await running.metric("complete") == (await running.snapshot()).info.complete == 1


async def subscribed(running: Running) -> tuple[asyncio.Task[Reply], Reply]:
    """A router that reads the feed."""
    seen = (await running.snapshot()).seq
    position = f"{running.agent.ranks[0].view.feed.epoch}:{seen}"
    task, reply = running.client.begin("GET", "/cache/events", headers={"last-event-id": position})
    await eventually(lambda: running.agent.ranks[0].view.feed.subscribers == 1)
    return task, reply


async def test_events_and_load_reach_a_subscriber(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        _, reply = await subscribed(running)
        engine.values |= {"running": 3, "waiting": 2, "usage": 0.25}
        await eventually(lambda: '"running":3' in reply.text)
        await engine.publish(A)
        await eventually(lambda: "event: batch" in reply.text)
        batch = decode_batch(reply.data[-1])
        assert batch.load == Load(running=3, waiting=2, prefill_tokens=200, free_blocks=75, total_blocks=100)
        assert (batch.seq, len(batch.events)) == (1, 1)


async def test_an_engine_that_restarts(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        await engine.publish(A, B)
        await sees(running, keys(1, 2))
        task, _ = await subscribed(running)
        await engine.stop()
        await eventually(lambda: running.agent.problem)
        status, why = await running.health()
        assert status == 503
        assert "ended" in why
        assert (await running.client.get("/cache/state")).status == 503
        await asyncio.wait_for(task, 5)
        await engine.start()
        await engine.publish(C)
        await sees(running, keys(3))
        assert await running.metric("epochs_total", reason="connected") == 2


async def test_joining_after_the_history_was_lost(beside: Start) -> None:
    async with FakeEngine(buffer=1) as engine:
        await engine.publish(A, B)
        async with beside(engine) as running:
            await sees(running, keys(2))
            assert await running.metric("complete") == 0
            await engine.publish(packed(removed(1), stored([4], [4] * 16, 1)))
            await eventually(lambda: running.agent.ranks[0].view.follower.blocks.unknown_removals == 1)
            assert await running.metric("dropped_blocks_total", reason="unknown_parent") == 1
            assert await running.keys() == keys(2)


async def test_an_engine_without_replay(beside: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.agent.subscription.REPLAY_TIMEOUT", 0.05)
    async with FakeEngine(replays=False) as engine:
        await engine.publish(A)
        async with beside(engine) as running:
            await follows(running)
            await engine.publish(B)
            await sees(running, keys(2))
            assert await running.metric("replays_total", outcome="unanswered") == 2
        async with beside(engine, replay_endpoint="") as running:
            await follows(running)
            await engine.publish(C)
            await sees(running, keys(3))
            assert await running.metric("replays_total", outcome="unanswered") == 0


async def test_a_lost_last_batch_is_asked_for_after_a_time_without_events(
    beside: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.agent.rank.EVENT_TIMEOUT", 0.05)
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        engine.lose(A)
        await sees(running, keys(1))


async def test_an_unhealthy_engine(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        await engine.publish(A)
        await sees(running, keys(1))
        epoch = (await running.snapshot()).info.epoch
        engine.health = 500
        await eventually(lambda: running.agent.problem)
        assert await running.health() == (503, (await running.client.get("/health")).text)
        assert "/health answers 500" in running.agent.problem
        assert (await running.client.get("/cache/events")).status == 503
        assert await running.metric("engine_up") == 0
        await engine.publish(B)
        engine.health = 200
        await follows(running)
        await sees(running, keys(1, 2))
        assert (await running.snapshot()).info.epoch == epoch


async def test_an_engine_that_is_too_slow(beside: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        monkeypatch.setattr("worker.agent.engine.TIMEOUT", 0.05)
        engine.answers.clear()
        await eventually(lambda: "does not answer within" in running.agent.problem)
        engine.answers.set()
        monkeypatch.undo()
        await follows(running)


async def test_an_absent_engine(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine, engine_url="http://127.0.0.1:9") as running:
        await eventually(lambda: "Cannot connect" in running.agent.problem)
        assert (await running.health())[0] == 503
        assert await running.metric("following") == 0


async def test_the_block_size_is_the_engine_s_whatever_the_settings_say(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine, block_size=32) as running:
        await follows(running)
        await engine.publish(A)
        await sees(running, keys(1))
        assert (await running.snapshot()).info.block_size == 16


async def test_an_engine_that_returns_with_another_description(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        await follows(running)
        await engine.publish(A)
        await sees(running, keys(1))
        engine.values |= {"block_size": 24, "blocks": 51}
        await eventually(lambda: running.agent.ranks[0].view.state.info.capacity == 50)
        await follows(running)
        snapshot = await running.snapshot()
        assert (snapshot.info.block_size, snapshot.blocks) == (24, ())


async def test_an_engine_that_does_not_state_its_sizes(beside: Start) -> None:
    async with FakeEngine() as engine:
        engine.values |= {"block_size": "None", "blocks": "None"}
        async with beside(engine) as running:
            await eventually(lambda: "AGENT_BLOCK_SIZE" in running.agent.problem)
        async with beside(engine, block_size=16, blocks=7) as running:
            await follows(running)
            assert (await running.snapshot()).info.capacity == 7


async def test_other_paths_and_methods(beside: Start) -> None:
    async with FakeEngine() as engine, beside(engine) as running:
        assert (await running.client.get("/nothing")).status == 404
        assert (await running.client.post("/health", {})).status == 405
