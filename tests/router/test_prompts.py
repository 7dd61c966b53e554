"""What the router reads out of requests, and which prompts it leaves unread.

Not covered: what an answer to a request of several sequences reports (test_reported_sequences.py); that its tokens are
the engine's, which is tested with the emulated engine (tests/e2e) and with recorded answers of a real one
(tests/kvcache); the order in which prompts are read (test_prompt_queue.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from kvcache.chat.request import ChatOptions
from kvcache.keys import block_keys
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from router.assembly import Router
from router.core.catalogue import OWN_TOKENIZER, Catalogue, Served
from router.core.decision import RouteRequest, Unread
from router.discovery.sources import StaticDiscovery
from router.server.prompts import (
    BYTES_PER_TOKEN,
    CHAT,
    COMPLETIONS,
    INLINE_TEXT,
    INVOCATIONS,
    LONG_DEPTH,
    MESSAGES,
    OTHER_FIELDS,
    RESPONSES,
    PromptReader,
)
from router.settings import Settings
from runtime.backoff import Backoff
from tests.router.conftest import StartRouter, until
from tests.router.fakes import fake_workers, good

WORDS = "every good boy does fine and all cows eat grass "


def serving(longest: int | None) -> Catalogue:
    """What a worker that takes so many tokens makes of the catalogue."""
    return Catalogue({"m": Served("m", "m", False, OWN_TOKENIZER, longest)}, complete=True)


class Reading:
    """A reader whose workers take `longest` tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.longest: int | None = None
        self.reader = PromptReader(tokenizer, 16, lambda: serving(self.longest), timeout=20)

    async def prompt(self, prompt: Any, **fields: Any) -> Any:
        return await self.reader.read(COMPLETIONS, orjson.dumps({"prompt": prompt, **fields}))


@pytest.fixture
async def reading(tokenizer: Tokenizer) -> AsyncIterator[Reading]:
    reading = Reading(tokenizer)
    yield reading
    reading.reader.close()


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(WORDS * 20, id="text, on the event loop"),
        pytest.param(WORDS * (INLINE_TEXT // 20), id="text, in a thread"),
        pytest.param(list(range(400)), id="ids, on the event loop"),
        pytest.param(list(range(40_000)), id="ids, in a thread"),
        pytest.param([n % 50_000 for n in range(16 * (LONG_DEPTH + 100) + 5)], id="ids, keys computed in the thread"),
    ],
)
async def test_keys_are_the_same_wherever_a_prompt_is_read(reading: Reading, tokenizer: Tokenizer, prompt: Any) -> None:
    route = await reading.prompt(prompt, model="m", stream=True, max_tokens=7)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    expected = block_keys(ids, 16)
    assert (route.prompt_tokens, route.model, route.streaming, route.output_tokens) == (len(ids), "m", True, 7)
    assert route.keys.all() == expected
    assert route.keys.all(above=3) == expected[3:]
    assert [route.keys.key(depth) for depth in (1, len(expected))] == [expected[0], expected[-1]]
    assert route.unread is None


@pytest.mark.parametrize("length", [1, 10, 10_000])
async def test_what_no_worker_takes_is_not_read(reading: Reading, length: int) -> None:
    reading.longest = length
    text = WORDS * (length // 4 + 1)
    route = await reading.prompt(text, model="m", stream=True)
    assert (route.keys, route.unread, route.model, route.streaming) == (None, Unread.TOO_LONG, "m", True)
    # The worker cuts a prompt down where it is told to: then it is not too long.
    assert (await reading.prompt(text, truncate_prompt_tokens=1)).unread is None


async def test_a_prompt_as_long_as_the_context_is_read(reading: Reading, tokenizer: Tokenizer) -> None:
    text = WORDS * 2000
    reading.longest = len(tokenizer.encode(text))
    assert (await reading.prompt(text)).unread is None
    reading.longest -= 1
    assert (await reading.prompt(text)).unread is Unread.TOO_LONG


async def test_a_body_beyond_all_contexts_is_not_even_parsed(reading: Reading) -> None:
    reading.longest = 100
    body = (
        b'{"model": "m\\u00e9", "stream": true, "prompt": "'
        + b"x" * (100 * BYTES_PER_TOKEN + OTHER_FIELDS)
        + b'", BROKEN'
    )
    route = await reading.reader.read(COMPLETIONS, body)
    assert (route.unread, route.model, route.streaming) == (Unread.TOO_LONG, "m\u00e9", True)


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body", "output"),
    [
        pytest.param(MESSAGES, {"messages": HI, "system": "be", "max_tokens": 7, "n": 3}, 7, id="messages"),
        pytest.param(RESPONSES, {"input": "hi", "instructions": "be", "max_output_tokens": 7}, 7, id="responses"),
        pytest.param(RESPONSES, {"input": HI, "instructions": "be", "max_tokens": 7}, None, id="responses, items"),
    ],
)
async def test_other_apis_are_read_as_the_chat_that_they_stand_for(
    reading: Reading, path: str, body: dict[str, Any], output: int | None
) -> None:
    chat = {"messages": [{"role": "system", "content": "be"}, *HI], "model": "m", "cache_salt": "s"}
    same = await reading.reader.read(CHAT, orjson.dumps(chat))
    route = await reading.reader.read(path, orjson.dumps({**body, "model": "m", "cache_salt": "s", "stream": True}))
    assert route.keys is not None
    assert (route.prompt_tokens, route.keys.all()) == (same.prompt_tokens, same.keys.all())
    assert (route.model, route.streaming, route.output_tokens, route.reported) == ("m", True, output, None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(MESSAGES, {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
                     id="a document"),
        pytest.param(RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, id="a reference"),
    ],
)  # fmt: skip
async def test_a_prompt_that_is_the_engines_to_read_goes_by_load(
    reading: Reading, path: str, body: dict[str, Any]
) -> None:
    route = await reading.reader.read(path, orjson.dumps({**body, "model": "m", "stream": True}))
    assert (route.keys, route.unread, route.model, route.streaming) == (None, Unread.UNREADABLE, "m", True)


async def test_an_invocation_is_read_as_what_it_is_whatever_model_it_names(tokenizer: Tokenizer) -> None:
    """vLLM takes the adapter from a header, and ignores the model of the body."""
    model = Served("m", "m", adapter=False, tokenizer=OWN_TOKENIZER, max_model_len=None)
    catalogue = Catalogue({"m": model, "lora": replace(model, name="lora", adapter=True)})
    reader = PromptReader(tokenizer, 16, lambda: catalogue)

    async def read(path: str, adapter: str | None = None, **fields: Any) -> RouteRequest:
        return await reader.read(path, orjson.dumps(fields), adapter)

    long = [{"role": "user", "content": WORDS * 9}]
    for path, prompt in ((CHAT, {"messages": long}), (COMPLETIONS, {"prompt": WORDS * 9})):
        same = await read(path, model="m", **prompt)
        assert same.keys.all()
        for named, model_name in (("m", "m"), ("lora", "m"), ("nope", None)):
            route = await read(INVOCATIONS, model=named, **prompt)
            assert (route.model, route.keys.all()) == (model_name, same.keys.all())
        of_adapter = await read(path, model="lora", **prompt)
        assert of_adapter.keys.all() != same.keys.all()
        route = await read(INVOCATIONS, "lora", model="m", **prompt)
        assert (route.model, route.keys.all()) == ("lora", of_adapter.keys.all())
    for unclear in ({"messages": HI, "prompt": "x"}, {"input": "x"}):
        assert (await read(INVOCATIONS, **unclear)).unread is Unread.UNREADABLE
    reader.close()


async def test_the_arguments_of_a_tool_call_are_read_exactly(tokenizer: Tokenizer) -> None:
    template = "{{ messages[0].tool_calls[0].function.arguments.n }}"
    reader = PromptReader(load_tokenizer("gpt2", ChatOptions(chat_template=template)), 16)
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {"n": 12345678901234567890123}}
    body = json.dumps({"messages": [{"role": "assistant", "content": [call]}]}).encode()
    route = await reader.read(MESSAGES, body)
    reader.close()
    assert route.prompt_tokens == len(tokenizer.encode("12345678901234567890123"))


async def test_what_takes_too_long_goes_by_load(tokenizer: Tokenizer) -> None:
    reader = PromptReader(tokenizer, 16, timeout=0.0)
    body = orjson.dumps({"prompt": WORDS * 10_000, "model": "m"})
    route = await reader.read(COMPLETIONS, body)
    assert (route.keys, route.unread, route.model) == (None, Unread.BUSY, "m")
    reader.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(COMPLETIONS, b"{", id="half an object"),
        pytest.param(COMPLETIONS, b"[]", id="list"),
        pytest.param(COMPLETIONS, b"{" * INLINE_TEXT * 9, id="deep"),
        pytest.param(COMPLETIONS, b'{"prompt": {}}', id="prompt of a wrong type"),
        pytest.param(CHAT, b'{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}', id="audio"),
        pytest.param(COMPLETIONS, b'{"prompt": "\\ud800", "model": "\\udfff"}', id="half surrogate pairs"),
        pytest.param(
            COMPLETIONS, b'{"prompt": "a", "cache_salt": "\\udfff"}', id="cache salt with half a surrogate pair"
        ),
        pytest.param(COMPLETIONS, b'{"prompt": [1, NaN]}', id="NaN among ids"),
        pytest.param(
            CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', id="chat with half a surrogate pair"
        ),
    ],
)
async def test_what_is_no_prompt_is_the_workers_to_refuse(reading: Reading, path: str, body: bytes) -> None:
    assert (await reading.reader.read(path, body)).unread is Unread.UNREADABLE


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "%s", "x": NaN}',
        b'{"prompt": "%s", "x": [Infinity, -Infinity]}',
        b'{"prompt": "%s", "user": "\\ud800"}',
        b'\xef\xbb\xbf{"prompt": "%s"}',
        '{"prompt": "%s"}'.encode("utf-16-le"),
        '{"prompt": "%s"}'.encode("utf-32"),
    ],
    ids=["NaN", "Infinity", "half a surrogate pair elsewhere", "byte order mark", "UTF-16", "UTF-32"],
)
async def test_json_is_read_as_liberally_as_by_vllm(reading: Reading, tokenizer: Tokenizer, body: bytes) -> None:
    """Each sent twice to a running vLLM 0.32, the second answer reported the prompt's blocks as cached."""
    encoding = json.detect_encoding(body)
    route = await reading.reader.read(COMPLETIONS, (body.decode(encoding) % (WORDS * 8)).encode(encoding))
    assert route.unread is None
    assert route.prompt_tokens == len(tokenizer.encode(WORDS * 8))


async def test_requests_say_by_metric_why_their_prompt_was_not_read(start_router: StartRouter) -> None:
    async with fake_workers(good) as workers, start_router(workers) as router:
        no_prompt = {"no": "prompt"}
        await router.complete(no_prompt)
        assert router.metric("prompts_unread_total", why="unreadable") == 1
        explained = (await router.management.post("/route/explain", json={"prompt": no_prompt})).json()
        assert explained["decision"]["unread"] == "unreadable"


# --- without a tokenizer ----------------------------------------------------------------------------------------------


class Broken:
    """A source of tokenizers that fails until it is mended."""

    def __init__(self) -> None:
        self.mended = False
        self.tries = 0

    def __call__(self, name: str) -> Tokenizer:
        self.tries += 1
        if not self.mended:
            raise TokenizerError(f"tokenizer {name!r} cannot be loaded: it is not there")
        return load_tokenizer(name)


async def test_without_a_tokenizer_requests_go_by_load_and_it_is_tried_again(
    start_router: StartRouter,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("router.server.tokenizer_loader.TOKENIZER_BACKOFF", Backoff(0.02, 60.0))
    broken = Broken()
    async with fake_workers(good) as workers:
        workers[0].serve_feed(tokenizer.fingerprint)
        workers[0].blocks = [(key, None) for key in block_keys(range(160), 16)[:1]]
        async with start_router(workers, load=broken, routing_strategy="cache_aware") as router:
            await until(lambda: broken.tries > 2)
            assert (await router.complete(list(range(160)))).status_code == 200
            assert (await router.management.get("/ready")).status_code == 200
            page = (await router.management.get("/status")).json()
            assert page["tokenizer"]["state"] == "failed"
            assert "it is not there" in page["tokenizer"]["error"]
            assert page["workers"] == {"known": 1, "ready": 1, "matching": 0}
            (worker,) = (await router.management.get("/workers")).json()["workers"]
            assert "tokenizer is not loaded" in worker["why_not_matching"]
            assert router.metric("prompts_unread_total", why="no_tokenizer") == 1
            assert router.metric("tokenizer_loaded") == 0
            unmatched = [record for record in caplog.records if "worker_unmatched" in record.getMessage()]
            assert {record.levelno for record in unmatched} == {logging.INFO}  # no fault of the worker's
            broken.mended = True
            await until(lambda: router.metric("tokenizer_loaded") == 1)
            await workers[0].publish()
            await until(lambda: all(status.matching for status in router.router.fleet.workers(router.router.clock())))
            answer = await router.complete(list(range(160)))
            assert answer.headers["x-kvcluster-matched-blocks"] == "1"


async def test_a_pushing_worker_is_routed_to_without_a_tokenizer_and_matched_with_it(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    broken = Broken()
    async with fake_workers(good) as workers, start_router(load=broken, ready=0) as router:
        worker = workers[0]
        worker.serve_feed(tokenizer.fingerprint)
        beat: dict[str, Any] = {
            "worker_id": "w", "epoch": 5, "model": "m", "block_size": 16, "fingerprint": tokenizer.fingerprint,
            "key_scheme": "sha256-prefix-128", "capacity": 100, "url": worker.url, "seq": 0,
            "load": {"running": 0, "waiting": 0, "prefill_tokens": 0, "free_blocks": 100, "total_blocks": 100},
        }  # fmt: skip

        async def heartbeat() -> httpx.Response:
            return await router.management.post("/internal/heartbeat", json=beat)

        assert (await heartbeat()).json() == {"resync": False}
        assert router.candidates() == 1
        router.router.tokenizer.loaded(tokenizer)
        assert (await heartbeat()).json() == {"resync": True}


async def test_ready_waits_for_the_first_attempt(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(name: str) -> Tokenizer:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(20)
        return tokenizer

    async with fake_workers(good) as workers, start_router(workers, load=slow) as router:
        answer = await router.management.get("/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the tokenizer is being loaded")
        gate.set()
        await until(lambda: router.metric("tokenizer_loaded") == 1)
        assert (await router.management.get("/ready")).status_code == 200


def test_a_folder_that_is_no_tokenizer_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path / "nothing"))


@pytest.mark.parametrize("number", ["1000000000000000000000", "-9223372036854775809", "18446744073709551615", "1e30"])
async def test_a_number_in_a_tool_is_what_was_sent(number: str) -> None:
    options = ChatOptions(chat_template="{{ tools | tojson }}" + "x" * 60)
    tokenizer = load_tokenizer("gpt2", options)
    reader = PromptReader(tokenizer, 16)
    tool = orjson.dumps({"type": "function", "function": {"name": "f", "description": None, "parameters": {"m": 0}}})
    sent = tool.decode().replace('"m":0', f'"m":{number}')
    body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "tools": [{sent}]}}'
    route = await reader.read(CHAT, body.encode())
    reader.close()
    assert route.keys is not None
    written = f"[{json.dumps(json.loads(sent))}]" + "x" * 60
    tokens = tokenizer.encode(written, add_special_tokens=False)
    assert route.keys.all() == block_keys(tokens, 16)


async def test_the_engines_own_template_is_loaded_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.jinja"
    router = Router(Settings(chat_template=file), StaticDiscovery([]))
    loading = asyncio.create_task(router.tokenizer.run())
    try:
        await until(lambda: "chat template cannot be read" in router.tokenizer.status.error)
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    file.write_text("{{ messages[0].content }} by the engine's template")
    await router.tokenizer.run()
    assert router.prompts.tokenizer is not None
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert router.prompts.tokenizer.render_chat(chat) == "hi by the engine's template"
    options = Settings(chat_template=file).chat_options()
    assert router.fleet.config.fingerprint == load_tokenizer("gpt2", options).fingerprint
    await router.close()
