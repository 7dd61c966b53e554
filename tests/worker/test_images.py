"""Prompts with images: what routers predict of them, and what the emulated worker makes of them.

Not covered: keys with images by themselves (tests/kvcache/test_keys.py), the agent's reading of vLLM's events
(tests/worker/agent/test_blocks.py), and how a real vLLM identifies a picture (docs/vllm.md).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from kvcache.chat.request import ChatOptions
from kvcache.images import ImageRule, identifier
from kvcache.keys import CacheScope, block_keys
from kvcache.profiles import LatencyModel
from kvcache.prompts import chat_request_prompt, image_request_prompt
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.core.catalogue import OWN_TOKENIZER, catalogue
from router.core.fleet import Fleet, FleetConfig
from router.server.prompts import CHAT, PromptReader
from tests.worker.conftest import Harness
from tests.worker.images import image, image_request
from worker.agent.core.events import BlockStored, decode
from worker.agent.core.groups import EngineBlocks
from worker.emulator.engine.events import BlocksStored
from worker.emulator.engine.tokens import SequenceTokens
from worker.emulator.kv_events.encoding import VllmEvents
from worker.kv_events import WireFormat

Start = Callable[..., Harness]
URL = "http://worker"
END_OF_TEXT = 50256
RULE = ImageRule(END_OF_TEXT, 40, hashes_bytes=True)


def body_of(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny-llama", "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 1, **fields}


TEXT = {"type": "text", "text": "What is this? " * 8}


def with_template(source: str) -> Tokenizer:
    return load_tokenizer("gpt2", ChatOptions(chat_template=source))


LISTS = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}
{% if c.type == 'image' %}Look: <|endoftext|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"""
"""A template that takes contents as lists of parts, and writes the placeholder itself."""


async def test_predicted_and_reported_cached_tokens_are_equal(start: Start, tokenizer: Tokenizer) -> None:
    """Under eviction pressure; the agent's way to keys, by vLLM's own events, ends in the same blocks."""
    harness = start(image_tokens=40, blocks=60, max_model_len=900, speed=1000, profile="llama-3.1-8b-h100-80gb")
    rank, wire, followed = harness.rank, VllmEvents(WireFormat.MAP, {}), EngineBlocks(16)
    take = rank.async_engine.engine.take_events

    def taken() -> Any:
        events = take()
        if events:
            followed.apply(decode(wire.payload(events, 0.0, 0)))
        return events

    rank.async_engine.engine.take_events = taken  # type: ignore[method-assign]
    info = rank.state.info
    reader = PromptReader(tokenizer, 16, lambda: catalogue([(info, OWN_TOKENIZER)], ""))
    fleet = Fleet(FleetConfig(16, info.fingerprint, LatencyModel(0.01, 0.01, 0.01, 0.01)))
    fleet.add(URL)
    rng = random.Random(3)
    hits = beyond = 0
    for _ in range(120):
        fleet.apply_snapshot(URL, rank.state.snapshot(), 0.0)
        body = image_request(rng)
        route = await reader.read(CHAT, json.dumps(body).encode())
        assert route.unread is None
        predicted = fleet.choose(route, 0.0).matched_blocks * 16
        reply = await harness.client.post(CHAT, body)
        assert reply.status == 200, reply.text
        usage = reply.json()["usage"]
        assert route.prompt_tokens == usage["prompt_tokens"]
        assert predicted == usage["prompt_tokens_details"]["cached_tokens"]
        hits += predicted > 0
        first = image_request_prompt(body, tokenizer, RULE).images
        beyond += bool(first) and predicted > first[0][0]
        assert sorted(key for key, _ in followed.blocks()) == sorted(key for key, _ in rank.engine.blocks())
    assert hits > 30
    assert beyond > 15, "hits go on beyond the first image"


@pytest.mark.parametrize("template", [None, LISTS], ids=["text", "lists of parts"])
def test_a_prompt_is_known_up_to_its_first_image(template: str | None, tokenizer: Tokenizer) -> None:
    reader = tokenizer if template is None else with_template(template)
    before = [{"role": "system", "content": "You see pictures. " * 5}]
    body = body_of(image(1), TEXT)
    body["messages"] = before + body["messages"]
    read = image_request_prompt(body, reader, None)
    whole = image_request_prompt(body, reader, RULE)
    assert not read.images
    assert read.tokens == whole.tokens[: len(read.tokens)]
    assert len(read.tokens) <= whole.images[0][0] <= len(read.tokens) + 3, "all that comes before the image is read"
    assert read.length > len(read.tokens)
    assert len(whole.tokens) == whole.length


def test_a_placeholder_stands_for_each_image(tokenizer: Tokenizer) -> None:
    read = image_request_prompt(body_of(TEXT, image(0), image(1, "my cat"), image(0)), tokenizer, RULE)
    names = [identifier(part, RULE) for part in (image(0), image(1, "my cat"), image(0))]
    assert [name for _, name in read.images] == names
    assert names[1] == "my cat"
    assert names[0] == names[2] != names[1]
    for at, _ in read.images:
        assert read.tokens[at : at + 40] == [END_OF_TEXT] * 40
    text = chat_request_prompt(body_of(TEXT), tokenizer)
    assert len(read.tokens) == len(text) + 3 * 41, "a line each"


def test_images_that_cannot_be_identified_end_what_is_known(tokenizer: Tokenizer) -> None:
    elsewhere = {"type": "image_url", "image_url": {"url": "https://example.dev/cat.png"}}
    for part in (
        elsewhere,
        {**elsewhere, "uuid": 5},
        image(0, ""),
        {"type": "image_url", "image_url": {"url": "data:,x"}},
    ):
        assert identifier(part, RULE) is None
        read = image_request_prompt(body_of(image(1), part, TEXT), tokenizer, RULE)
        assert not read.images
    assert identifier(image(1), ImageRule(1, 1)) is None, "vLLM hashes the picture, not the bytes"
    assert identifier({**elsewhere, "uuid": "cat"}, ImageRule(1, 1)) == "cat"


async def test_the_text_s_own_placeholders_are_no_images(start: Start, tokenizer: Tokenizer) -> None:
    body = body_of(image(0), {"type": "text", "text": "a <|endoftext|> b <|endoftext|> c"})
    assert not image_request_prompt(body, tokenizer, RULE).images
    reply = await start(image_tokens=40).client.post(CHAT, body)
    assert (reply.status, reply.json()["error"]["type"]) == (400, "BadRequestError")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(
            body_of({"type": "image_url", "image_url": {"url": "http://example.dev/a.png"}}), "data URL", id="a URL"
        ),
        pytest.param(
            body_of({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}), "data URL", id="no"
        ),
        pytest.param(body_of({"type": "image_url"}), "data URL", id="no image"),
        pytest.param(body_of(image(0), {"type": "video_url"}), "validation error", id="a video"),
        pytest.param(
            {"model": "tiny-llama", "messages": [{"role": "system", "content": [image(0)]}]},
            "validation error",
            id="an image of the system",
        ),
        pytest.param(body_of(*[image(0)] * 60, TEXT), "maximum context length", id="too many"),
        pytest.param(body_of(image(0), TEXT, truncate_prompt_tokens=5), "truncate_prompt_tokens", id="cut"),
    ],
)
async def test_requests_that_are_refused(start: Start, body: dict[str, Any], says: str) -> None:
    reply = await start(image_tokens=40).client.post(CHAT, body)
    assert reply.status == 400
    assert says in reply.text


async def test_a_worker_without_images_refuses_them_as_before(start: Start) -> None:
    reply = await start().client.post(CHAT, body_of(image(0), TEXT))
    assert (reply.status, reply.json()["error"]["message"]) == (400, "tiny-llama is not a multimodal model")


def test_what_vllm_s_events_say_of_images(tokenizer: Tokenizer) -> None:
    tokens = SequenceTokens(list(range(64)), 16, CacheScope("s"), [(10, "cat"), (40, "dog")], 30)
    stored = BlocksStored(tuple(tokens.keys(4)), None, tokens, 0)
    assert stored.keys == tuple(block_keys(list(range(64)), 16, CacheScope("s"), [(10, "cat"), (40, "dog")]))
    (event,) = decode(VllmEvents(WireFormat.MAP, {}).payload([stored], 0.0, 0))
    assert isinstance(event, BlockStored)
    assert event.extra_keys == [
        [["cat", 10], "s"],
        [["cat", -6]],
        [["cat", -22], ["dog", 8]],
        [["dog", -8]],
    ]
