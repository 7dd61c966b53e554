"""Data-parallel ranks of one emulated worker: several engines behind one port, as vLLM 0.32 with --data-parallel-size.

Covers: which engine a request gets, by its header and without it; ranks that do not exist; feeds and metrics of each
rank; KV events on ports of their own. Statuses and words were compared with a vLLM of two ranks (docs/vllm.md). Not
covered: what a router makes of ranks (tests/router/test_ranks.py), whole clusters (tests/e2e/test_ranks.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcache.feed import decode_snapshot
from tests.worker.conftest import Harness, Reply

HEADER = "X-data-parallel-rank"
PROMPT = list(range(1, 100))
BODY = {"prompt": PROMPT, "max_tokens": 1}
OUT_OF_RANGE = {
    "error": {
        "message": "data_parallel_rank 7 is out of range [0, 2).",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
}


async def ask(harness: Harness, rank: str | None = None, path: str = "/v1/completions", **fields: Any) -> Reply:
    headers = {} if rank is None else {HEADER: rank}
    return await harness.client.post(path, BODY | fields, headers)


def cached(reply: Reply) -> int:
    details: dict[str, int] = reply.json()["usage"]["prompt_tokens_details"]
    return details["cached_tokens"]


def finished(harness: Harness) -> list[int]:
    """Finished requests by rank."""
    return [sum(rank.engine.stats.finished.values()) for rank in harness.worker.ranks]


async def test_each_rank_has_a_cache_of_its_own(start) -> None:
    harness = start(data_parallel_size=2)
    asked = [await ask(harness, rank) for rank in ("1", "0", "1", " +1 ")]
    assert [cached(reply) for reply in asked] == [0, 0, 96, 96]
    assert finished(harness) == [1, 3]
    for rank, each in enumerate(harness.worker.ranks):
        snapshot = decode_snapshot((await harness.client.get(f"/cache/state?rank={rank}")).body)
        assert snapshot.blocks == tuple(each.engine.blocks())
        assert (snapshot.info.worker_id, snapshot.info.rank, snapshot.info.ranks) == (
            f"{harness.worker.info.worker_id}/{rank}",
            rank,
            2,
        )


async def test_the_feed_of_a_rank_tells_its_events_only(start) -> None:
    harness = start(data_parallel_size=2)
    streams = [harness.client.begin("GET", f"/cache/events?rank={rank}") for rank in range(2)]
    await asyncio.sleep(0.1)
    await ask(harness, "1")
    await asyncio.sleep(0.1)
    assert [b'"stored"' in reply.body for _, reply in streams] == [False, True]
    harness.worker.feed.close()
    await asyncio.gather(*(task for task, _ in streams))


@pytest.mark.parametrize(("rank", "status"), [("2", 404), ("9" * 30, 404), ("x", 400), ("-1", 400)])
async def test_a_feed_of_no_rank(start, rank: str, status: int) -> None:
    client = start(data_parallel_size=2).client
    for path in ("/cache/state", "/cache/events"):
        reply = await client.get(f"{path}?rank={rank}")
        assert (reply.status, reply.json()["error"]["param"]) == (status, "rank")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "hi"}]]}),
    ],
)
async def test_a_rank_that_does_not_exist_is_refused(start, path: str, fields: dict[str, Any]) -> None:
    harness = start(data_parallel_size=2)
    body = {"model": "tiny-llama", **(fields or BODY)}
    reply = await harness.client.post(path, body, {HEADER: "7"})
    assert (reply.status, reply.json()) == (400, OUT_OF_RANGE)
    if "batch" not in path:
        reply = await harness.client.post(path, body | {"stream": True}, {HEADER: "7"})
        assert (reply.status, reply.chunks, reply.data[-1]) == (200, [OUT_OF_RANGE], "[DONE]")
    assert finished(harness) == [0, 0]


async def test_messages_refuse_it_in_their_own_shape(start) -> None:
    body = {"model": "tiny-llama", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    reply = await start().client.post("/v1/messages", body, {HEADER: "1"})
    message = "data_parallel_rank 1 is out of range [0, 1)."
    assert reply.json() == {"type": "error", "error": {"type": "BadRequestError", "message": message}}
    assert reply.status == 400


@pytest.mark.parametrize("header", [pytest.param("", id="empty"), "x", "1.0"])
async def test_a_header_that_is_no_number_is_ignored(start, header: str) -> None:
    assert (await ask(start(data_parallel_size=2), header)).status == 200


async def test_responses_and_other_paths_do_not_read_it(start) -> None:
    client = start(data_parallel_size=2).client
    reply = await client.post("/v1/responses", {"input": "hi", "max_output_tokens": 16}, {HEADER: "7"})
    assert reply.status == 200
    assert (await client.post("/tokenize", {"prompt": "hi"}, {HEADER: "7"})).status == 200


async def test_what_is_wrong_with_the_sampling_is_said_first(start) -> None:
    harness = start(data_parallel_size=2)
    for fields in ({"top_p": 2}, {"model": "other"}, {"prompt": [1] * 5000}):
        assert "out of range" not in (await ask(harness, "7", **fields)).text


async def test_without_a_header_sequences_go_where_the_fewest_are(start) -> None:
    harness = start(data_parallel_size=3)
    busy = [harness.client.begin("POST", "/v1/completions", BODY | {"max_tokens": 64, "ignore_eos": True, "n": 3})]
    await asyncio.sleep(0.01)
    assert [rank.async_engine.active for rank in harness.worker.ranks] == [1, 1, 1]
    pinned = {**BODY, "max_tokens": 64, "ignore_eos": True}
    busy += [harness.client.begin("POST", "/v1/completions", pinned, headers={HEADER: "0"}) for _ in range(2)]
    await asyncio.sleep(0.01)
    busy += [harness.client.begin("POST", "/v1/completions", pinned) for _ in range(4)]
    await asyncio.sleep(0.01)
    assert [rank.async_engine.active for rank in harness.worker.ranks] == [3, 3, 3]
    await asyncio.gather(*(task for task, _ in busy))


async def test_a_queue_counts_more_the_fuller_the_cache(start) -> None:
    """Four sequences that run are less load than one that runs and one that waits for blocks."""
    harness = start(data_parallel_size=2, blocks=130, max_num_seqs=8)
    long = [{"prompt": [token] * 1900, "max_tokens": 60, "ignore_eos": True} for token in (1, 2)]
    tasks = [harness.client.begin("POST", "/v1/completions", body, headers={HEADER: "0"}) for body in long]
    tasks += [
        harness.client.begin(
            "POST", "/v1/completions", BODY | {"max_tokens": 60, "ignore_eos": True}, headers={HEADER: "1"}
        )
        for _ in range(4)
    ]
    await asyncio.sleep(0.5)
    assert [(load.running, load.waiting) for load in (rank.engine.load() for rank in harness.worker.ranks)] == [
        (1, 1),
        (4, 0),
    ]
    tasks.append(harness.client.begin("POST", "/v1/completions", BODY))
    await asyncio.sleep(0.01)
    assert [rank.async_engine.active for rank in harness.worker.ranks] == [2, 5]
    await asyncio.gather(*(task for task, _ in tasks))


async def test_metrics_have_a_sample_for_each_rank(start) -> None:
    harness = start(data_parallel_size=2, blocks=256)
    for rank in ("0", "1", "1"):
        await ask(harness, rank)
    text = (await harness.client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = Counter((s.name, tuple(sorted(s.labels.items()))) for f in families.values() for s in f.samples)
    assert max(samples.values()) == 1
    for family in families.values():
        if family.name.startswith("vllm:"):
            assert {sample.labels["engine"] for sample in family.samples} == {"0", "1"}
    hits = {s.labels["engine"]: s.value for s in families["vllm:prefix_cache_hits"].samples if s.name.endswith("total")}
    assert hits == {"0": 0, "1": 96}
    (config,) = {s.labels["num_gpu_blocks"] for s in families["vllm:cache_config_info"].samples}
    assert config == str(2 * 257)  # vLLM states the sum


async def test_a_reset_drops_the_blocks_of_every_rank(start) -> None:
    harness = start(data_parallel_size=2, dev_mode=True)
    for rank in ("0", "1"):
        await ask(harness, rank)
    assert (await harness.client.post("/reset_prefix_cache", {})).json() == {"success": True}
    assert [rank.engine.blocks() for rank in harness.worker.ranks] == [[], []]


async def test_a_dead_engine_ends_the_requests_of_the_others(start, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = start(data_parallel_size=2)

    def broken(now: float) -> None:
        raise RuntimeError("a bug")

    task, other = harness.client.begin(
        "POST", "/v1/completions", BODY | {"max_tokens": 500, "ignore_eos": True}, headers={HEADER: "0"}
    )
    died = asyncio.create_task(harness.worker.died())
    await asyncio.sleep(0.05)
    monkeypatch.setattr(harness.worker.ranks[1].engine, "advance", broken)
    assert (await ask(harness, "1")).status == 500
    await died
    await task
    assert other.status == 500
    assert (await harness.client.get("/health")).status == 503
