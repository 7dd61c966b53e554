"""Several models and LoRA adapters behind one router, over HTTP: emulated workers in this process, with their own feed.

Covers: the list of models, what names nobody serves get, prompts that are looked up under their adapter and by their
model's tokenizer, adapters that come and go, and what the management port says of it. Not covered: the rules by
themselves (core/test_models.py), and the emulator's adapters (tests/worker/test_adapters.py).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from kvcache.chat.request import ChatOptions
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.settings import Settings as RouterSettings
from runtime.http.server import HttpLimits, HttpServer
from runtime.settings import SettingsError
from runtime.sockets import listen
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.fakes import fake_workers
from worker.emulator.generators import make_generator
from worker.lora.modules import LoraModule
from worker.main import Worker
from worker.settings import Settings

PROMPT = [number % 1000 for number in range(400)]
LORA = {"enable_lora": True, "max_loras": 4, "allow_runtime_lora_updating": True}
SQL, LAW = LoraModule("sql", "acme/sql"), LoraModule("law", "acme/law")


@dataclass
class Emulated:
    """A worker that serves on a port of its own."""

    worker: Worker
    url: str

    async def load(self, name: str) -> None:
        self.worker.adapters.load(name, f"acme/{name}")


StartWorkers = Callable[..., AbstractAsyncContextManager[list[Emulated]]]


@pytest.fixture
def start_workers(tokenizer: Tokenizer) -> StartWorkers:
    """`async with start_workers({"model": "a"}, {"model": "b"}) as workers`: one for each set of settings."""

    @asynccontextmanager
    async def start(*settings: dict[str, Any]) -> AsyncIterator[list[Emulated]]:
        async with AsyncExitStack() as stack:
            started = []
            for fields in settings:
                chosen = Settings(**{"model": "tiny-llama", "max_model_len": 2048, "speed": 1000.0, **fields})
                generator = make_generator(chosen.generator, tokenizer, seed=chosen.seed, mean_tokens=8)
                sock = listen("127.0.0.1", 0)
                port = sock.getsockname()[1]
                worker = Worker(chosen, tokenizer, generator, port)
                stack.callback(worker.close)
                server = HttpServer(worker.app, sock, HttpLimits(), cancel_on_disconnect=True)
                await server.start()
                stack.push_async_callback(server.stop, 0)
                stack.callback(worker.feed.close)
                started.append(Emulated(worker, f"http://127.0.0.1:{port}"))
            yield started

    return start


def shown(answer: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(card["id"], card["parent"]) for card in answer["data"]]


async def ask(router: RunningRouter, model: str | None, prompt: Any = PROMPT) -> tuple[int, int]:
    """(predicted, reported) cached tokens."""
    fields = {} if model is None else {"model": model}
    answer = await router.complete(prompt, **fields)
    assert answer.status_code == 200, answer.text
    reported = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return 16 * int(answer.headers["x-kvcluster-matched-blocks"]), reported


# --- what there is ---


async def test_the_list_of_models_is_the_union_of_the_workers(start_workers, start_router: StartRouter) -> None:
    settings = [
        {"model": "base", "served_model_name": ("base", "base-2"), "lora_modules": (SQL,), **LORA},
        {"model": "base", "served_model_name": ("base", "base-2"), "lora_modules": (SQL, LAW), **LORA},
        {"model": "other", "max_model_len": 512},
    ]
    async with start_workers(*settings) as workers, start_router(workers, model="base") as router:
        listed = (await router.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert shown(listed) == [
            ("base", None), ("base-2", None), ("other", None), ("sql", "base"), ("law", "base")
        ]  # fmt: skip
        assert [card["max_model_len"] for card in listed["data"]] == [2048, 2048, 512, None, None]
        theirs = (await router.client.get(f"{workers[0].url}/v1/models")).json()["data"]
        assert [card.keys() for card in listed["data"][:2]] == [card.keys() for card in theirs[:2]]
        one = (await router.client.get("/v1/models/sql")).json()
        assert (one["id"], one["object"], one["parent"]) == ("sql", "model", "base")
        unknown = await router.client.get("/v1/models/nobody")
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")


async def test_a_worker_that_has_said_nothing_is_asked_itself(start_router: StartRouter) -> None:
    async def one_model(connection, request) -> None:
        await connection.answer(200, b'{"object":"list","data":[]}')

    async with fake_workers(one_model) as workers, start_router(workers) as router:
        assert (await router.client.get("/v1/models")).json() == {"object": "list", "data": []}
        assert len(workers[0].received) == 1
        assert (await router.complete(model="whatever")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/v1/messages"]
)
async def test_a_name_that_nobody_serves_gets_vllms_404_from_the_router(
    start_workers, start_router: StartRouter, path: str
) -> None:
    async with start_workers({"model": "base"}) as workers, start_router(workers) as router:
        answer = await router.client.post(path, json={"model": "nobody", "prompt": "x", "messages": []})
        assert workers[0].worker.service.last_request == -math.inf
        assert router.metric("requests_total", code="404", strategy="round_robin") == 1
        like = path if path.startswith("/v1/messages") else "/v1/completions"
        body = {"model": "nobody", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        theirs = await router.client.post(f"{workers[0].url}{like}", json=body)
        assert (answer.status_code, answer.content) == (404, theirs.content)


async def test_with_several_models_and_no_default_a_prompt_has_to_name_one(
    start_workers, start_router: StartRouter
) -> None:
    async with start_workers({"model": "a"}, {"model": "b"}) as workers, start_router(workers) as router:
        answer = await router.complete()
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert "a, b" in answer.json()["error"]["message"]
    async with start_workers({"model": "a"}, {"model": "b"}) as workers, start_router(workers, model="b") as router:
        assert {(await router.complete()).json()["model"] for _ in range(4)} == {"b"}


# --- prompts ---


async def test_an_adapters_prompts_are_looked_up_under_it_and_the_bases_under_the_base(
    start_workers, start_router: StartRouter
) -> None:
    """A base request right after an adapter's of the same prompt has nothing cached, and the other way around."""
    settings = {"lora_modules": (SQL, LAW), **LORA}
    async with start_workers(settings) as workers, start_router(workers) as router:
        asked = [await ask(router, name) for name in ("sql", "tiny-llama", "law", "sql", None, "law")]
        assert asked == [(0, 0), (0, 0), (0, 0), (384, 384), (384, 384), (384, 384)]


async def test_a_request_goes_to_a_worker_that_has_the_adapter(start_workers, start_router: StartRouter) -> None:
    async with start_workers(LORA, {"lora_modules": (SQL,), **LORA}) as workers, start_router(workers) as router:
        for _ in range(4):
            await ask(router, "sql")
        assert [each.worker.ranks[0].engine.stats.prefilled for each in workers] == [0, 4]
        await workers[0].load("law")
        await until(lambda: "law" in router.router.fleet.directory.catalogue.served)
        assert await ask(router, "law") == (0, 0)
        assert [each.worker.ranks[0].engine.stats.prefilled for each in workers] == [1, 4]


async def test_an_unloaded_adapter_is_unknown_again(start_workers, start_router: StartRouter) -> None:
    async with start_workers({"lora_modules": (SQL,), **LORA}) as workers, start_router(workers) as router:
        workers[0].worker.adapters.unload("sql")
        await until(lambda: "sql" not in router.router.fleet.directory.catalogue.served)
        assert (await router.complete(model="sql")).status_code == 404


async def test_an_adapter_that_is_listed_and_not_loaded_is_waited_for(
    start_workers, start_router: StartRouter, tmp_path
) -> None:
    file = tmp_path / "adapters.json"
    file.write_text('[{"name": "sql", "source": "/nowhere/sql"}]')
    async with start_workers({"adapters_file": file, **LORA}) as (one,):
        await one.worker.load_adapters()
        async with start_router([one]) as router:
            answer = await router.complete(model="sql")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["message"] == "No worker has loaded the adapter 'sql' yet. Try again later."
            message = {"model": "sql", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
            answer = await router.client.post("/v1/messages", json=message)
            assert (answer.status_code, answer.json()["type"]) == (503, "error")
            (page,) = (await router.management.get("/status")).json()["models"]
            (why,) = page["missing"]["sql"].values()
            assert why == "Loading lora sql failed: No adapter found for /nowhere/sql"
            file.write_text('[{"name": "sql", "source": "acme/sql"}]')
            await one.worker.load_adapters()
            await until(lambda: "sql" in router.router.fleet.directory.catalogue.served)
            assert await ask(router, "sql") == (0, 0)


async def test_each_model_is_read_by_its_own_tokenizer(
    start_workers, start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    """The other model's chats begin with another template, so only its own tokenizer finds their blocks."""
    template = "{% for m in messages %}<<{{ m.content }}>>{% endfor %}"
    chat = {"messages": [{"role": "user", "content": "the words of the user, " * 20}], "max_tokens": 2}
    other = load_tokenizer("gpt2", ChatOptions(chat_template=template))
    settings = [{"model": "a"}, {"model": "b", "trust_request_chat_template": True}]
    async with start_workers(*settings) as workers:
        workers[1].worker.service.tokenizer = other
        workers[1].worker.ranks[0].state.info = replace(
            workers[1].worker.ranks[0].state.info, fingerprint=other.fingerprint
        )
        async with start_router(
            workers,
            load=lambda name: {"gpt2": tokenizer, "other": other}[name],
            model="a",
            model_tokenizers=(("b", "other"),),
        ) as router:
            await until(lambda: all(status.matching for status in router.router.fleet.workers(router.router.clock())))
            for model in "ab":
                for expected in (False, True):
                    answer = await router.client.post("/v1/chat/completions", json={"model": model, **chat})
                    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                    assert 16 * int(answer.headers["x-kvcluster-matched-blocks"]) == cached
                    assert (cached > 0) is expected
            status = (await router.management.get("/status")).json()
            assert status["tokenizers"]["b"]["state"] == "loaded"
            assert [(page["name"], page["matching"]) for page in status["models"]] == [("a", 1), ("b", 1)]


async def test_the_management_port_shows_models_and_adapters(start_workers, start_router: StartRouter) -> None:
    settings = [{"lora_modules": (SQL,), "served_model_name": ("m", "m-2"), **LORA}, {"model": "m"}]
    async with start_workers(*settings) as workers, start_router(workers, model="m") as router:
        page = (await router.management.get("/status")).json()["models"]
        assert page == [
            {
                "name": "m", "names": ["m-2"], "workers": 2, "ready": 2, "matching": 2, "adapters": {"sql": 1},
                "missing": {},
            }
        ]  # fmt: skip
        rows = (await router.management.get("/workers")).json()["workers"]
        assert [(row["names"], row["adapters"], row["missing_adapters"]) for row in rows] == [
            (["m-2"], ["sql"], {}),
            ([], [], {}),
        ]
        explained = await router.management.post("/route/explain", json={"model": "sql", "prompt": "x"})
        assert [row["url"] for row in explained.json()["candidates"]] == [workers[0].url]


def test_tokenizers_of_models_are_pairs() -> None:
    settings = RouterSettings.load(["--model-tokenizers", "a=gpt2,org/b=org/b"])
    assert settings.model_tokenizers == (("a", "gpt2"), ("org/b", "org/b"))
    with pytest.raises(SettingsError, match="'a' is no MODEL=TOKENIZER"):
        RouterSettings.load(["--model-tokenizers", "a"])
