"""LoRA adapters of the emulator: the endpoints as a running vLLM 0.32 answered, the flags, and what is kept apart.

Not covered: the limit of adapters in a batch (tests/worker/engine/test_adapters.py), the file of wanted adapters
(tests/worker/lora), and how routers use the names (tests/router).
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvcache.feed import AdaptersChanged, decode_batch, decode_snapshot
from runtime.settings import SettingsError
from worker.lora.modules import LoraModule
from worker.settings import Settings

CAPTURE = Path(__file__).parent.parent / "data" / "vllm" / "lora.txt"
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "allow_runtime_lora_updating": True}
PROMPT = list(range(1, 40))


@pytest.fixture
def folders(tmp_path, monkeypatch) -> None:
    """Adapters of rank 8 and one of rank 64, as the captured engine had them."""
    for name, rank in (("lora1", 8), ("lora2", 8), ("big", 64)):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    monkeypatch.chdir(tmp_path)


def exchanges() -> list[tuple[str, str, str, int, str]]:
    """(method, path, request, status, answer) of each captured exchange, in order."""
    found = []
    for part in CAPTURE.read_text().split("### ")[1:]:
        head, _, answer = part.partition("\n")
        method, path, request = (*head.split(" ", 2), "")[:3]
        top, _, body = answer.partition("\n\n")
        found.append((method, path, request.strip(), int(top.split()[1]), body.strip()))
    return found


def comparable(text: str) -> Any:
    """An answer without what differs each time: times, ids of permissions, the model's folder."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    for card in value.get("data", ()):
        card |= {"created": 0, "root": card["root"] if card["parent"] else ""}
        card["permission"] = [permission | {"id": "", "created": 0} for permission in card["permission"]]
    return value


async def test_the_endpoints_answer_as_vllm_did(start, folders) -> None:
    client = start(lora_modules=(LoraModule("lora1", "models/lora1"),), **LORA).client
    for method, path, request, status, answer in exchanges():
        reply = await client.request(method, path, request.encode())
        assert (reply.status, comparable(reply.text)) == (status, comparable(answer)), request


async def test_an_adapter_shares_no_block_with_its_base_and_answers_carry_its_name(start) -> None:
    harness = start(lora_modules=(LoraModule("sql", "acme/sql"), LoraModule("law", "acme/law")), **LORA)

    async def ask(model: str) -> tuple[str, int]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 2}
        answer = (await harness.client.post("/v1/completions", body)).json()
        return answer["model"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    cold = [await ask(name) for name in ("sql", "law", "tiny-llama")]
    assert cold == [("sql", 0), ("law", 0), ("tiny-llama", 0)]
    assert [await ask(name) for name in ("sql", "law", "tiny-llama")] == [("sql", 32), ("law", 32), ("tiny-llama", 32)]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        pytest.param("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, id="chat"),
        pytest.param("/v1/responses", {"input": "hi"}, id="responses"),
        pytest.param("/v1/messages", {"messages": [{"role": "user", "content": "hi"}]}, id="messages"),
        pytest.param("/v1/completions", {"prompt": "hi"}, id="completions"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_every_api_names_the_adapter(start, path: str, fields: dict[str, Any], stream: bool) -> None:
    client = start(lora_modules=(LoraModule("sql", "acme/sql"),), **LORA).client
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    reply = await client.post(path, {"model": "sql", "stream": stream, limit: 2, **fields})
    assert set(re.findall(r'"model": ?"([^"]+)"', reply.text)) == {"sql"}


async def test_the_feed_says_which_adapters_are_loaded(start) -> None:
    harness = start(lora_modules=(LoraModule("sql", "acme/sql"),), **LORA)
    before = decode_snapshot((await harness.client.get("/cache/state")).body)
    assert before.info.adapters == ("sql",)
    seen: list[bytes] = []
    harness.rank.feed.listen(lambda events: seen.extend(events))
    await harness.client.post("/v1/load_lora_adapter", {"lora_name": "law", "lora_path": "acme/law"})
    await harness.client.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
    assert seen == [AdaptersChanged(("sql", "law")), AdaptersChanged(("law",))]
    after = decode_snapshot((await harness.client.get("/cache/state")).body)
    assert (after.info.adapters, after.seq) == (("law",), before.seq + 2)


async def test_without_the_switch_adapters_cannot_be_changed_by_requests(start) -> None:
    client = start(enable_lora=True).client
    reply = await client.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"})
    assert (reply.status, reply.json()) == (404, {"detail": "Not Found"})


async def test_without_lora_nothing_can_be_loaded(start) -> None:
    client = start(allow_runtime_lora_updating=True).client
    reply = await client.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"})
    assert reply.status == 500
    assert "Use --enable-lora to enable LoRA." in reply.json()["error"]["message"]
    with pytest.raises(SettingsError, match=r"--lora-modules: .*--enable-lora"):
        start(lora_modules=(LoraModule("sql", "acme/sql"),))


async def test_the_metric_names_the_adapters_in_use(start) -> None:
    harness = start(lora_modules=(LoraModule("sql", "acme/sql"),), **LORA)
    task, _ = harness.client.begin(
        "POST", "/v1/completions", json.dumps({"model": "sql", "prompt": PROMPT, "max_tokens": 50}).encode()
    )
    await asyncio.sleep(0)
    pattern = r'lora_requests_info\{max_lora="2",running_lora_adapters="(.*)",waiting_lora_adapters="(.*)"\} \d'
    assert re.findall(pattern, (await harness.client.get("/metrics")).text) == [("sql", "sql")]
    task.cancel()


@pytest.mark.parametrize(
    ("argv", "modules"),
    [
        pytest.param(["--lora-modules", "a=x", "b=y"], [("a", "x"), ("b", "y")], id="as vLLM takes several"),
        pytest.param(["--lora-modules", "a=x", "--speed", "2"], [("a", "x")], id="one, and another flag"),
        pytest.param(["--lora-modules=a=x", "--lora-modules=b=y"], [("a", "x"), ("b", "y")], id="repeated"),
        pytest.param(["--lora-modules", '{"name": "a", "path": "x"}', "b=y"], [("a", "x"), ("b", "y")], id="JSON"),
    ],
)
def test_modules_are_given_as_to_vllm(argv: list[str], modules: list[tuple[str, str]]) -> None:
    assert [(module.name, module.path) for module in Settings.load(argv).lora_modules] == modules


def test_modules_come_from_the_environment_too(monkeypatch) -> None:
    monkeypatch.setenv("WORKER_LORA_MODULES", '{"name":"a","path":"x","base_model_name":"m"} b=y')
    assert Settings.load([]).lora_modules == (LoraModule("a", "x", "m"), LoraModule("b", "y"))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        pytest.param(["--lora-modules", "nonsense"], "Invalid JSON format for --lora-modules: nonsense", id="no pair"),
        pytest.param(["--lora-modules", '{"nome": "a"}'], "Invalid fields for --lora-modules", id="another field"),
        pytest.param(["--max-lora-rank", "7"], "vLLM takes one of 1, 8, 16, 32", id="rank"),
    ],
)
def test_a_bad_module_is_refused(argv: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(complaint)):
        Settings.load(argv)


def test_a_batch_with_adapters_can_be_read() -> None:
    data = b'{"epoch":1,"seq":2,"events":[{"type":"adapters","names":["a"]}],"load":{"running":0,"waiting":0,'
    data += b'"prefill_tokens":0,"free_blocks":1,"total_blocks":1}}'
    assert decode_batch(data).events == (AdaptersChanged(("a",)),)
