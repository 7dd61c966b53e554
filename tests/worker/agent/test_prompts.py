"""An engine whose prompts differ from the routers' is detected and reported before any prompt is matched.

Not covered: that a router then refuses to match (`tests/e2e`); vLLM's own `/tokenize` (`tests/real_vllm`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from kvcache.chat.request import ChatOptions
from kvcache.prompts import PromptError, chat_request_prompt
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from runtime.backoff import Backoff
from tests.processes import eventually
from tests.worker.agent.conftest import Start
from tests.worker.agent.engine import FakeEngine
from worker.agent.prompts import PROBES, Agreement, AgreementEvent, Comparison, Expected, Tokenized, compare

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}!{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("gpt2", ChatOptions(chat_template=TEMPLATE))


def answers(tokenizer: Tokenizer, body: dict[str, Any]) -> list[int] | int:
    """What an engine with this tokenizer answers."""
    if "prompt" in body:
        return tokenizer.encode(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))
    try:
        return chat_request_prompt(body, tokenizer)
    except PromptError:
        return 400


class Engine:
    """Answers at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def tokenize(self, body: dict[str, Any]) -> Tokenized | None:
        tokens = answers(self._tokenizer, body)
        return None if isinstance(tokens, int) else Tokenized(tokens, 2048)


async def compared(tokenizer: Tokenizer, source: str | None = None, **options: Any) -> Comparison:
    other = load_tokenizer("gpt2", ChatOptions(chat_template=source, **options))
    return await compare(Engine(other), Expected.of(tokenizer))


async def test_an_engine_with_the_same_tokenizer_agrees(tokenizer: Tokenizer) -> None:
    assert await compared(tokenizer, TEMPLATE) == Comparison(
        AgreementEvent.EQUAL, tokenizer.fingerprint, max_model_len=2048
    )


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(None, id="no template"),
        pytest.param(TEMPLATE.replace("<{{ m.role }}>", "[{{ m.role }}]"), id="role marks"),
        pytest.param(TEMPLATE.replace("{{ tools | tojson }}", "{{ tools | tojson(indent=2) }}"), id="indented tools"),
        pytest.param(TEMPLATE.replace(".city", " | tojson"), id="arguments as JSON"),
        pytest.param(TEMPLATE.replace("<assistant>", "<assistant>\n"), id="generation prompt"),
        pytest.param(TEMPLATE.replace("!", "!!"), id="tool result"),
        pytest.param(TEMPLATE + "{# 'developer' #}", id="developer"),
        pytest.param(
            "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token }}{% endif %}{% endfor %}" + TEMPLATE,
            id="system adds a token",
        ),
    ],
)
async def test_any_other_template_is_found(tokenizer: Tokenizer, source: str | None) -> None:
    found = await compared(tokenizer, source)
    assert found.outcome is AgreementEvent.DIFFERENT
    assert found.fingerprint.startswith("engine-")
    assert "tokens instead of" in found.why


async def test_engine_options_that_change_prompts_are_found(tokenizer: Tokenizer) -> None:
    kwargs = {"enable_thinking": False}
    found = await compared(tokenizer, TEMPLATE, default_chat_template_kwargs=kwargs)
    assert found.outcome is AgreementEvent.DIFFERENT
    found = await compared(tokenizer, TEMPLATE, chat_template_content_format="openai")
    assert found.outcome is AgreementEvent.DIFFERENT


async def test_what_either_side_refuses_is_no_difference(tokenizer: Tokenizer) -> None:
    no_tools = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    complaining = TEMPLATE + no_tools
    for ours, theirs in ((TEMPLATE, complaining), (complaining, TEMPLATE)):
        mine = load_tokenizer("gpt2", ChatOptions(chat_template=ours))
        assert (await compared(mine, theirs)).outcome is AgreementEvent.EQUAL


def test_the_probes_reach_every_part_of_a_template(tokenizer: Tokenizer) -> None:
    """Each probe becomes another prompt than the rest."""
    prompts = [tuple(tokens) for _, tokens in Expected.of(tokenizer).prompts if tokens is not None]
    assert len(set(prompts)) == len(PROBES)


# --- the agent ----------------------------------------------------------------------------------------------


async def test_a_difference_and_its_end_reach_routers(beside: Start, tokenizer: Tokenizer, caplog: Any) -> None:
    other = load_tokenizer("gpt2")
    async with FakeEngine() as engine:
        engine.tokenize = partial(answers, other)
        async with beside(engine, expected=lambda: Expected.of(tokenizer)) as running:
            await eventually(lambda: running.agent.agreement is Agreement.DIFFERENT and not running.agent.problem)
            info = (await running.snapshot()).info
            assert info.fingerprint.startswith("engine-")
            assert await running.metric("prompts", state="different") == 1
            assert await running.metric("prompts", state="equal") == 0
            assert "prompts_differ" in caplog.text
            engine.tokenize = partial(answers, tokenizer)
            await engine.stop()  # it comes back with another template
            await eventually(lambda: running.agent.problem)
            await engine.start()
            await eventually(lambda: running.agent.agreement is Agreement.EQUAL and not running.agent.problem)
            later = (await running.snapshot()).info
            assert (later.fingerprint, later.epoch > info.epoch) == (tokenizer.fingerprint, True)
            assert later.max_model_len == 2048


async def test_nothing_is_served_before_the_engine_was_asked(beside: Start, tokenizer: Tokenizer) -> None:
    async with FakeEngine() as engine:
        engine.tokenize = lambda body: 500
        async with beside(engine, expected=lambda: Expected.of(tokenizer)) as running:
            await eventually(lambda: "/tokenize answers 500" in running.agent.problem)
            assert (await running.client.get("/cache/state")).status == 503
            engine.tokenize = partial(answers, tokenizer)
            await eventually(lambda: not running.agent.problem)
            assert (await running.snapshot()).info.fingerprint == tokenizer.fingerprint


async def test_loading_a_tokenizer_is_retried(
    beside: Start, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.agent.agent.TOKENIZER_BACKOFF", Backoff(0.01, 60.0))
    attempts = iter([TokenizerError("no such folder"), RuntimeError("the hub is not well")])

    def load() -> Expected:
        for error in attempts:
            raise error
        return Expected.of(tokenizer)

    async with FakeEngine() as engine:
        engine.tokenize = partial(answers, tokenizer)
        async with beside(engine, expected=load) as running:
            await eventually(lambda: running.agent.agreement is Agreement.EQUAL and not running.agent.problem)
            assert (await running.snapshot()).info.fingerprint == tokenizer.fingerprint


async def test_without_a_tokenizer_the_load_is_served_and_nothing_matches(beside: Start) -> None:
    def load() -> Expected:
        raise TokenizerError("no such folder")

    async with FakeEngine() as engine, beside(engine, expected=load) as running:
        await eventually(lambda: running.agent.agreement is Agreement.UNLOADABLE and not running.agent.problem)
        assert (await running.snapshot()).info.fingerprint == "unknown"
        assert await running.metric("prompts", state="unloadable") == 1


async def test_without_tokenize_prompts_stay_unchecked(beside: Start, tokenizer: Tokenizer) -> None:
    async with FakeEngine() as engine, beside(engine, expected=lambda: Expected.of(tokenizer)) as running:
        await eventually(lambda: running.agent.agreement is Agreement.UNCHECKED and not running.agent.problem)
        assert (await running.snapshot()).info.fingerprint == tokenizer.fingerprint
