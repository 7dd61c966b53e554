"""The pods of real engines, native sidecar and all: a miniature vLLM in the main container, the real agent beside.

Not covered: vLLM itself (tests/real_vllm), chat and streams, which the miniature has not.
"""

from __future__ import annotations

import signal

import httpx
import pytest

from tests.kube.e2e.support import World
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

VLLM = {
    "model": {"name": "tiny", "tokenizer": "gpt2", "maxModelLen": 1024},
    "engine": {"type": "vllm"},
    "cache": {"blocks": 512},
}
BODY = {"model": "tiny", "prompt": "A long document about routing and caches. " * 40, "max_tokens": 4}


async def test_routers_follow_the_cache_of_an_engine_by_its_agent(world: World):
    await world.serve(workers=2, **VLLM)
    async with httpx.AsyncClient(base_url=world.url(), timeout=30, trust_env=False) as client:

        async def fresh() -> bool:
            return await world.api.condition("rag", "CacheViewFresh", "Fresh")

        await eventually(fresh, "the routers follow both agents", 60)
        first = await client.post("/v1/completions", json=BODY)
        assert first.status_code == 200, first.text
        where = first.headers["x-kvcluster-worker"]
        for _ in range(4):
            again = await client.post("/v1/completions", json=BODY)
            assert again.headers["x-kvcluster-worker"] == where
            assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    names = {pod["metadata"]["name"] for pod in await world.pods("worker")}
    assert where in names


async def test_a_lost_cache_view_is_reported_and_takes_no_worker_out_of_service(world: World):
    await world.serve(workers=1, **VLLM)
    (pod,) = await world.pods("worker")
    name = pod["metadata"]["name"]
    await eventually(lambda: world.api.condition("rag", "CacheViewFresh", "Fresh"), "it is followed", 60)
    # Frozen, not killed: it would be restarted in no time.
    world.node.kill(name, signal.SIGSTOP, container="agent")

    async def told() -> bool:
        conditions = await world.api.conditions("rag")
        return any(each["type"] == "CacheViewFresh" and each["status"] == "False" for each in conditions)

    await eventually(told, "the status says that the view is lost", 60)
    async with httpx.AsyncClient(base_url=world.url(), timeout=30, trust_env=False) as client:
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    (pod,) = await world.pods("worker")
    ready = next(each for each in pod["status"]["conditions"] if each["type"] == "Ready")
    assert ready["status"] == "True"
    assert await world.api.condition("rag", "Ready", "Serving")
    world.node.kill(name, signal.SIGCONT, container="agent")
    await eventually(lambda: world.api.condition("rag", "CacheViewFresh", "Fresh"), "it is followed again", 60)
