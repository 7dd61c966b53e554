"""LoRA adapters and several KVClusters behind one endpoint, from the manifests to the answers.

The list of adapters changes while workers run, and no pod is replaced. Not covered: real engines (tests/real_vllm), and
each part by itself (tests/controller/objects/test_adapters.py, tests/router/test_models.py).
"""

from __future__ import annotations

import httpx
import pytest

from tests.kube.e2e.support import World
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

SQL, NONE = {"name": "sql", "source": "acme/sql"}, {"name": "none", "source": "/nowhere/none"}
PROMPT = [number % 1000 for number in range(400)]


async def test_a_list_of_adapters_changes_under_running_workers(world: World):
    await world.serve(name="poet", workers=1, model={"servedNames": ["poet"]})
    await world.serve(
        workers=2,
        model={"servedNames": ["base"], "adapters": [SQL, NONE]},
        router={"replicas": 1, "serves": [{"cluster": "poet", "model": "poet", "tokenizer": "gpt2"}]},
    )
    pods = {pod["metadata"]["name"] for pod in await world.pods("worker")}

    async with httpx.AsyncClient(base_url=world.url(), timeout=30, trust_env=False) as client:

        async def listed(*names: str) -> bool:
            cards = (await client.get("/v1/models")).json()["data"]
            return [card["id"] for card in cards] == list(names)

        async def ask(model: str) -> tuple[str, int, int]:
            body = {"model": model, "prompt": PROMPT, "max_tokens": 2}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]["prompt_tokens_details"]
            return (
                answer.json()["model"],
                16 * int(answer.headers["x-kvcluster-matched-blocks"]),
                usage["cached_tokens"],
            )

        await eventually(lambda: listed("base", "poet", "sql"), "one list of all models", 60)
        assert [await ask(model) for model in ("sql", "base", "poet")] == [
            (name, 0, 0) for name in ("sql", "base", "poet")
        ]
        assert [await ask(model) for model in ("poet", "sql", "base")] == [
            (name, 384, 384) for name in ("poet", "sql", "base")
        ]
        assert (await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})).status_code == 404

        await eventually(lambda: world.api.condition("rag", "AdaptersReady", "AdapterRefused"), "it is told", 60)
        status = (await world.api.get("kvclusters", "rag"))["status"]
        assert status["adapters"]["summary"] == "1/2"
        assert status["models"] == "base, poet"
        degraded = next(each for each in status["conditions"] if each["type"] == "Degraded")
        assert "No adapter found for /nowhere/none" in degraded["message"]

        await world.api.patch(
            "kvclusters", "rag", {"spec": {"model": {"adapters": [SQL, {"name": "law", "source": "acme/law"}]}}}
        )
        await eventually(lambda: listed("base", "poet", "sql", "law"), "the new one is loaded", 60)
        await eventually(lambda: world.api.condition("rag", "AdaptersReady", "AdaptersLoaded"), "all are loaded", 60)
    assert {pod["metadata"]["name"] for pod in await world.pods("worker")} == pods
