"""What happens to an engine and on the way from it: the router never predicts a block that is not there for longer than
it takes to hear of it, and predicts exactly again afterwards.

Not covered: the agent's rules one by one (`tests/worker/agent`), and several workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest

from tests.real_vllm.bed import Bed, bed
from tests.real_vllm.mixes import EveryKind
from tests.real_vllm.served import Served
from tests.real_vllm.wire import Message, Wire, unchanged
from tests.router.conftest import StartRouter

pytestmark = [pytest.mark.process, pytest.mark.real_vllm, pytest.mark.timeout(1800)]


def prompt(number: int, tokens: int = 100) -> list[int]:
    """Token ids that no other number has at the same place."""
    return [1000 + (number * 131 + at * 7) % 40_000 for at in range(tokens)]


async def exact(one: Bed, prompts: Iterable[list[int]]) -> list[int]:
    """Ask for each prompt; every prediction must come true. The cached tokens of each."""
    found = []
    for tokens in prompts:
        outcome = await one.complete(tokens)
        assert outcome.verdict == "equal", (outcome, tokens[:3])
        found.append(outcome.cached or 0)
    return found


@pytest.fixture
async def beside(served: Served, start_router: StartRouter) -> AsyncIterator[Bed]:
    async with bed(served, start_router) as one:
        yield one


async def test_what_was_computed_is_predicted(beside: Bed) -> None:
    prompts = [prompt(number) for number in range(101, 105)]
    await exact(beside, prompts)
    assert await exact(beside, prompts) == [96] * 4
    longer = await exact(beside, [tokens + prompt(7, 40) for tokens in prompts])
    assert longer == [96] * 4


async def test_evicted_blocks_are_not_predicted(beside: Bed) -> None:
    """More prompts than the cache holds: what the first find when they come again, they find by chance."""
    many = [prompt(number, 900) for number in range(201, 206)]
    for _ in range(3):
        await exact(beside, many)
    await exact(beside, reversed(many))


async def test_a_reset_is_known_after_the_next_step(beside: Bed) -> None:
    """A rank says that its cache is empty with the first step that it makes afterwards."""
    beside.pinned = 0
    tokens = prompt(301)
    await exact(beside, [tokens, tokens])
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.post(f"{beside.served.url}/reset_prefix_cache")).status_code == 200
    await beside.complete([5])
    assert await exact(beside, [tokens, tokens]) == [0, 96]


async def test_a_request_that_is_given_up_leaves_a_true_view(beside: Bed) -> None:
    """Clients go away in the middle of streams, of prefills, and in the queue."""
    rng = random.Random(4)

    async def give_up(tokens: list[int], after: float) -> None:
        body = {"model": beside.served.model, "prompt": tokens, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                await beside.router.client.post("/v1/completions", json=body)

    prompts = [prompt(400 + number, rng.randint(100, 700)) for number in range(12)]
    await asyncio.gather(*(give_up(tokens, rng.uniform(0.0, 0.05)) for tokens in prompts))
    await exact(beside, prompts)
    await exact(beside, prompts[::-1])


async def test_many_at_once_leave_a_true_view(beside: Bed, seed: int) -> None:
    """Predictions of requests that overlap may be wrong. The view is not, once they have ended."""
    made = EveryKind.of(beside.served, seed)
    requests = [made.next() for _ in range(24)]
    await asyncio.gather(*(beside.ask_at_once(request.path, request.body) for request in requests))
    await beside.settled()
    blocks = beside.served.blocks()
    if blocks is not None:
        assert beside.held().total() == len(blocks)
        assert set(beside.held()) == set(blocks)
    for request in requests[:8]:
        request.body.pop("n", None)
        outcome = await beside.ask(request.path, request.body)
        assert outcome.verdict != "different", (outcome, request)


async def test_an_agent_that_comes_late_knows_what_was_before(served: Served, start_router: StartRouter) -> None:
    prompts = [prompt(number, 200) for number in range(501, 504)]
    async with bed(served, start_router) as one:
        await exact(one, prompts)
    async with bed(served, start_router) as another:
        assert await exact(another, prompts[::-1]) == [192] * 3


# --- faults on the way ------------------------------------------------------------------------------------------


class Gap:
    """Loses the next `count` batches."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, message: Message) -> Iterable[Message]:
        self.count -= 1
        return [] if self.count >= 0 else [message]


def twice(message: Message) -> Iterable[Message]:
    return [message, message]


def with_unknown_events(message: Message) -> Iterable[Message]:
    """Events of types, mediums and groups that nobody knows, and fields that nobody knows, beside the real ones."""
    seq, payload = message
    at, events, *rest = msgpack.unpackb(payload)
    new: list[Any] = [{"type": "BlockPinned", "block_hashes": [1]}, ["BlockPinned", [1], None]]
    stored = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [1] * 16}
    elsewhere = {"block_size": 16, "lora_id": None, "medium": "MOON", "lora_name": None, "colour": "blue"}
    another = {**elsewhere, "medium": "GPU", "group_idx": 99, "kv_cache_spec_kind": "unheard_of"}
    new += [stored | elsewhere, stored | another, {"type": "BlockRemoved", "block_hashes": [1], "medium": "MOON"}]
    known = [each | {"colour": "blue"} if isinstance(each, dict) else [*each, *[None] * 9, "blue"] for each in events]
    return [(seq, msgpack.packb([at, [*new, *known, *new], *rest]))]


@contextlib.asynccontextmanager
async def wired(served: Served, start_router: StartRouter, folder: Path) -> AsyncIterator[tuple[Bed, Wire]]:
    async with (
        Wire(folder, served.events, served.replay, served.ranks).connected() as wire,
        bed(served, start_router, wire) as one,
    ):
        one.pinned = 0  # the rank with the faults
        yield one, wire


async def test_a_gap_is_filled(served: Served, start_router: StartRouter, tmp_path: Path) -> None:
    prompts = [prompt(number, 200) for number in range(601, 605)]
    async with wired(served, start_router, tmp_path) as (one, wire):
        await exact(one, prompts[:1])
        wire.asked.clear()
        wire.fault = Gap(2)
        for tokens in prompts[1:]:
            await one.ask_at_once("/v1/completions", {"prompt": tokens, "max_tokens": 1})
        assert await exact(one, prompts) == [192] * 4
        assert wire.asked
        assert one.agent.complete


@pytest.mark.parametrize("fault", [twice, with_unknown_events])
async def test_what_changes_nothing_is_ignored(
    served: Served, start_router: StartRouter, tmp_path: Path, fault: Any
) -> None:
    prompts = [prompt(number, 200) for number in range(611, 614)]
    async with wired(served, start_router, tmp_path) as (one, wire):
        wire.fault = fault
        await exact(one, prompts)
        assert await exact(one, prompts) == [192] * 3
        assert one.agent.complete


async def test_lost_history_costs_hits_and_no_wrong_match(
    served: Served, start_router: StartRouter, tmp_path: Path
) -> None:
    """What was lost and is evicted later must not be predicted; what comes anew is."""
    old, new = [prompt(n, 200) for n in range(621, 624)], [prompt(n, 200) for n in range(631, 634)]
    async with wired(served, start_router, tmp_path) as (one, wire):
        await exact(one, old)
        wire.forgotten = 2**62
        wire.fault = Gap(1)
        for tokens in new[:2]:
            await one.ask_at_once("/v1/completions", {"prompt": tokens, "max_tokens": 1})
        for tokens in [*old, *new, *old, *new]:
            outcome = await one.complete(tokens)
            assert outcome.predicted <= (outcome.cached or 0)
        assert not one.agent.complete


async def test_garbage_costs_hits_and_no_wrong_match(served: Served, start_router: StartRouter, tmp_path: Path) -> None:
    spoilt = iter([b"\xc1", b"", msgpack.packb([1.0, [{"type": "BlockRemoved"}]]), msgpack.packb("no batch")])
    prompts = [prompt(number, 200) for number in range(641, 645)]
    async with wired(served, start_router, tmp_path) as (one, wire):
        await exact(one, prompts)
        wire.fault = lambda message: [(message[0], next(spoilt, message[1]))]
        for tokens in [prompt(number, 200) for number in range(651, 656)]:
            outcome = await one.complete(tokens)
            assert outcome.predicted <= (outcome.cached or 0)
        wire.fault = unchanged
        for tokens in prompts:
            outcome = await one.complete(tokens)
            assert outcome.predicted <= (outcome.cached or 0)
        fresh = [prompt(number, 200) for number in range(661, 663)]
        await exact(one, fresh)
        assert await exact(one, fresh) == [192] * 2


# --- the engine's process ---------------------------------------------------------------------------------------


async def test_a_restart_empties_the_view(restarting: Served, start_router: StartRouter) -> None:
    prompts = [prompt(number, 200) for number in range(701, 704)]
    async with bed(restarting, start_router) as one:
        await exact(one, prompts)
        await restarting.kill()
        await restarting.start()
        assert await exact(one, prompts) == [0] * 3
        assert await exact(one, prompts) == [192] * 3


async def test_an_engine_that_is_asked_to_end_finishes_its_stream(
    restarting: Served, start_router: StartRouter
) -> None:
    async with bed(restarting, start_router) as one:
        body = {"prompt": prompt(711), "max_tokens": 300, "stream": True, "ignore_eos": True}
        async with one.router.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            chunks = answer.aiter_bytes()
            received = await anext(chunks)
            ending = asyncio.create_task(restarting.terminate())
            received += b"".join([chunk async for chunk in chunks])
            await ending
        assert b'"finish_reason":"length"' in received
        await restarting.start()
        assert await exact(one, [prompt(712), prompt(712)]) == [0, 96]
