"""A cluster whose workers have two data-parallel ranks each: real processes, from the manifest to the answers.

Covers: predictions, which are the engines' own figures for each rank; traffic with evictions, after which every view
equals its rank's cache; a rank that does not exist; a worker that is killed. Not covered: the rules behind it
(tests/router/test_ranks.py, tests/worker/test_ranks.py), and figures beside workers of one rank (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter

import pytest

from kvcache.ranks import RANK_HEADER
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


def prompts(rng: random.Random, number: int) -> list[list[int]]:
    """Prompts that share their first part, of 8 kinds, in blocks of 16 tokens."""
    return [
        [token for _ in range(rng.randint(3, 9)) for token in [100 + kind] * 16] + rng.choices(range(5000), k=20)
        for kind in rng.choices(range(8), k=number)
    ]


async def test_ranks_are_workers_from_the_manifest_to_the_answers(start_cluster):
    rng = random.Random(5)
    async with start_cluster(workers=2, ranks=2, speed=100, blocks=150) as cluster:
        names = {f"{worker.name}/{rank}" for worker in cluster.local.workers for rank in range(2)}
        assert {worker["worker_id"] for worker in await cluster.router_workers()} == names

        async def ask(prompt: list[int], **headers: str):
            return await cluster.client.post(
                f"{cluster.url}/v1/completions", json={"prompt": prompt, "max_tokens": 4}, headers=headers
            )

        # One after the other, each once the router has seen what the last one changed: predicted = actual.
        asked, cached = Counter[str](), Counter[str]()
        for prompt in prompts(rng, 30):
            answer = await ask(prompt)
            worker = answer.headers["x-kvcluster-worker"]
            found = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert int(answer.headers["x-kvcluster-matched-blocks"]) * 16 == found
            asked[worker] += 1
            cached[worker] += found
            await eventually(cluster.views_agree, "every view is its rank's cache", 30)
        assert set(asked) == names
        for worker in cluster.local.workers:
            for rank in range(2):
                hits = await cluster.metric(worker.url, "vllm:prefix_cache_hits_total", engine=str(rank))
                assert hits == cached[f"{worker.name}/{rank}"]

        # Many at once, with evictions.
        answers = await asyncio.gather(*(ask(prompt) for prompt in prompts(rng, 120)))
        assert {answer.status_code for answer in answers} == {200}
        await eventually(cluster.views_agree, "every view is its rank's cache", 30)

        refused = await ask([1] * 20, **{RANK_HEADER: "7"})
        message = "data_parallel_rank 7 is out of range [0, 2)."
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)
        pinned = [await ask(prompt, **{RANK_HEADER: "1"}) for prompt in prompts(rng, 10)]
        assert {answer.headers["x-kvcluster-worker"][-2:] for answer in pinned} == {"/1"}

        killed = cluster.local.workers[0]
        assert killed.pid is not None
        os.kill(killed.pid, signal.SIGKILL)
        answers = await asyncio.gather(*(ask(prompt) for prompt in prompts(rng, 20)))
        assert {answer.status_code for answer in answers} == {200}
        await eventually(cluster.views_agree, "the new process is followed", 60)
