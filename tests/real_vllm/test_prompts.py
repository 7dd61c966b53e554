"""The router's token ids equal a running vLLM's, for random requests of every shape.

Not covered: tokenizers and chat templates other than those of the engine that the suite is given.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest

from kvcache.prompts import (
    PromptError,
    chat_request_prompt,
    completion_request_prompts,
    messages_chat_fields,
    responses_chat_fields,
)
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.real_vllm.agent_requests import AgentRequests
from tests.real_vllm.conftest import Engine
from tests.real_vllm.record import prompts, rendered
from tests.real_vllm.requests import Requests
from worker.agent.engine import engine_client
from worker.agent.prompts import AgreementEvent, Expected, compare

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(1200)]

TOKENIZE_FIELDS = frozenset(
    {"model", "messages", "prompt", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens",
     "chat_template", "chat_template_kwargs"}
)  # fmt: skip
"""What `/tokenize` takes; it knows `reasoning_content` by no other name, so messages with one are left out."""


def read(body: dict[str, Any], tokenizer: Tokenizer, max_model_len: int) -> list[list[int]] | None:
    try:
        if "messages" in body:
            return [chat_request_prompt(body, tokenizer, max_model_len)]
        return completion_request_prompts(body, tokenizer, max_model_len)
    except PromptError:
        return None


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_router_reads_what_the_engine_computes(
    engine: Engine, client: httpx.Client, engine_tokenizer: Tokenizer, seed: int, number: int, kind: str
) -> None:
    made, counts, wrong = Requests(seed, engine.model), Counter[str](), []
    for _ in range(number if kind == "chat" else number // 3):
        body = made.chat() if kind == "chat" else made.completion()
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        theirs, ours = prompts(client, path, body), read(body, engine_tokenizer, engine.max_model_len)
        outcome = (
            "refused by the engine" if theirs is None
            else "left to the engine" if ours is None
            else "equal" if ours == theirs
            else "different"
        )  # fmt: skip
        counts[outcome] += 1
        if outcome == "different":
            wrong.append(body)
    print(f"\n{kind}, seed {seed}: {dict(counts)}")  # noqa: T201
    assert not wrong, wrong[:3]
    assert not counts["left to the engine"], "everything that is generated here can be read"


def test_tokenize_says_the_same(
    engine: Engine, client: httpx.Client, engine_tokenizer: Tokenizer, seed: int, number: int
) -> None:
    made, counts = Requests(seed + 1, engine.model), Counter[str]()
    for _ in range(number):
        body = {name: value for name, value in made.chat().items() if name in TOKENIZE_FIELDS}
        if any("reasoning_content" in message for message in body["messages"]):
            continue
        answer = client.post("/tokenize", json=body)
        if answer.status_code == 200:
            ours = read(body, engine_tokenizer, engine.max_model_len)
            assert ours == [answer.json()["tokens"]], body
        counts["equal" if answer.status_code == 200 else "refused by the engine"] += 1
    print(f"\n/tokenize, seed {seed + 1}: {dict(counts)}")  # noqa: T201
    assert counts["equal"] > number / 3


@pytest.mark.parametrize("kind", ["messages", "responses"])
def test_the_prompts_of_agents(
    engine: Engine, client: httpx.Client, engine_tokenizer: Tokenizer, seed: int, number: int, kind: str
) -> None:
    made, counts, wrong = AgentRequests(seed, engine.model), Counter[str](), []
    chat_fields = messages_chat_fields if kind == "messages" else responses_chat_fields
    for _ in range(number):
        body = made.messages() if kind == "messages" else made.responses()
        theirs = rendered(client, f"/v1/{kind}", body)
        try:
            ours = chat_request_prompt(chat_fields(body, engine_tokenizer), engine_tokenizer, engine.max_model_len)
        except PromptError:
            ours = None
        if theirs is not None and body.get("thinking") == {"type": "disabled"}:
            # The render endpoint takes its effort for "none", the API itself asks the chat template.
            counted = client.post("/v1/messages/count_tokens", json=body).json()
            theirs = ours if ours is not None and len(ours) == counted["input_tokens"] else theirs
        outcome = (
            "refused by the engine" if theirs is None
            else "left to the engine" if ours is None
            else "equal" if ours == theirs
            else "different"
        )  # fmt: skip
        counts[outcome] += 1
        if outcome in ("different", "left to the engine"):
            wrong.append(body)
    print(f"\n{kind}, seed {seed}: {dict(counts)}")  # noqa: T201
    assert not wrong, wrong[:3]


async def test_the_agents_comparison(engine: Engine, engine_tokenizer: Tokenizer) -> None:
    async with engine_client(engine.url) as asked:
        assert (await compare(asked, Expected.of(engine_tokenizer))).outcome is AgreementEvent.EQUAL
        assert (await compare(asked, Expected.of(load_tokenizer("gpt2")))).outcome is AgreementEvent.DIFFERENT
