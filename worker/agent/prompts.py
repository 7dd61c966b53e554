"""Checks that the engine makes the same tokens of a request as the routers do, by asking its `/tokenize`.

If the engine has a chat template that routers do not know (`--chat-template`), other defaults or another vocabulary,
routers look for blocks that no request ever fills, and every request seems a miss. The agent therefore reads a fixed
set of requests as routers read them, and compares the tokens with the engine's answers each time it finds the engine. A
difference changes the fingerprint in the feed, and routers then refuse to match.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any, Protocol

from kvcache.chat.request import ChatOptions
from kvcache.keys import TokenIdError, pack_tokens
from kvcache.prompts import PromptError, chat_request_prompt
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError, load_tokenizer

UNKNOWN_FINGERPRINT = "unknown"
"""The fingerprint in the feed while the tokenizer cannot be loaded: no router has it."""


class Agreement(StrEnum):
    """What is known of the engine's prompts."""

    LOADING = "loading"
    """The tokenizer is being loaded for the first time."""
    UNLOADABLE = "unloadable"
    """It could not be loaded; further attempts follow."""
    PENDING = "pending"
    """The engine has not been asked yet, or not since it was lost."""
    EQUAL = "equal"
    DIFFERENT = "different"
    UNCHECKED = "unchecked"
    """The engine has no `/tokenize`, or refused every probe."""


class AgreementEvent(Enum):
    """What changes the agreement."""

    LOAD_FAILED = auto()
    LOADED = auto()
    EQUAL = auto()
    DIFFERENT = auto()
    UNCHECKED = auto()
    ENGINE_LOST = auto()
    """The engine, or the connection to its events, is gone: what comes back may be another engine."""


_COMPARED = {
    AgreementEvent.EQUAL: Agreement.EQUAL,
    AgreementEvent.DIFFERENT: Agreement.DIFFERENT,
    AgreementEvent.UNCHECKED: Agreement.UNCHECKED,
}
AGREEMENT_TRANSITIONS: Mapping[Agreement, Mapping[AgreementEvent, Agreement]] = {
    Agreement.LOADING: {
        AgreementEvent.LOAD_FAILED: Agreement.UNLOADABLE,
        AgreementEvent.LOADED: Agreement.PENDING,
        AgreementEvent.ENGINE_LOST: Agreement.LOADING,
    },
    Agreement.UNLOADABLE: {
        AgreementEvent.LOAD_FAILED: Agreement.UNLOADABLE,
        AgreementEvent.LOADED: Agreement.PENDING,
        AgreementEvent.ENGINE_LOST: Agreement.UNLOADABLE,
    },
    Agreement.PENDING: {**_COMPARED, AgreementEvent.ENGINE_LOST: Agreement.PENDING},
    **{outcome: {AgreementEvent.ENGINE_LOST: Agreement.PENDING} for outcome in _COMPARED.values()},
}


_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_USER = {"role": "user", "content": "What is the weather in Zürich?"}
_SYSTEM = {"role": "system", "content": "Be brief. 简短"}
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "12 °C"}
_NESTED_TOOL = {
    "type": "function",
    "function": {
        "name": "plan",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"legs": {"type": "array", "items": {"type": "object", "properties": {"to": {}}}}},
            "additionalProperties": False,
        },
        "strict": True,
    },
}
_THOUGHT = {
    "role": "assistant",
    "reasoning": "Two legs, then.",
    "content": "One moment.",
    "tool_calls": [
        {
            "id": "call_2",
            "type": "function",
            "function": {
                "name": "plan",
                "arguments": '{"legs": [{"to": "Zürich", "days": 2.0}, null], "exact": true, "note": "\\"<b>\\n"}',
            },
        },
        {"id": "call_3", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
    ],
}
_RESULTS = [{"role": "tool", "tool_call_id": name, "content": "[]"} for name in ("call_2", "call_3")]
_ANSWER = {"role": "assistant", "content": "12 °C, it says."}

PROBES: Sequence[dict[str, Any]] = (
    {"prompt": "The quick brown fox\n\tjumps over 12345 lazy dogs: été, 東京, 🙂 <|im_end|></s>"},
    {"prompt": "no special tokens", "add_special_tokens": False},
    {"messages": [_USER]},
    {"messages": [_SYSTEM, _USER]},
    {"messages": [_SYSTEM, _USER, _ANSWER, {"role": "user", "content": "And tomorrow?"}]},
    {"messages": [{"role": "developer", "content": "Be brief."}, _USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]},
    {"messages": [_USER], "add_generation_prompt": False},
    {"messages": [_USER, _ANSWER], "add_generation_prompt": False, "continue_final_message": True},
    {"messages": [_USER], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [_SYSTEM, _USER], "tools": [_TOOL]},
    {"messages": [_USER, _CALL, _RESULT], "tools": [_TOOL]},
    {"messages": [_USER, _THOUGHT, *_RESULTS, _USER], "tools": [_TOOL, _NESTED_TOOL]},
)
"""Bodies of `POST /tokenize`, one of each kind that chat templates treat differently."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the routers' tokenizer makes of the probes: each with its token ids, or None if it cannot be read."""

    fingerprint: str
    prompts: Sequence[tuple[dict[str, Any], list[int] | None]]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Expected:
        """Read the probes with this tokenizer."""
        return cls(tokenizer.fingerprint, [(probe, _read(probe, tokenizer)) for probe in PROBES])


def expected_prompts(name: str, options: ChatOptions) -> Expected:
    """What the tokenizer of this name makes of the probes. Takes 0.1 s, or minutes for a download. Raises
    `TokenizerError`."""
    return Expected.of(load_tokenizer(name, options))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of a comparison, and the fingerprint for the feed."""

    outcome: AgreementEvent
    fingerprint: str
    why: str = ""
    """The first difference, or why nothing could be compared."""
    max_model_len: int = 0
    """The engine's longest context in tokens; 0 if it did not say."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """An answer of `/tokenize`: token ids, and the longest context (0: not stated)."""

    tokens: list[int]
    max_model_len: int = 0


class Tokenizes(Protocol):
    """The part of the engine's API that this module uses."""

    async def tokenize(self, body: dict[str, Any]) -> Tokenized | None:
        """The engine's answer, or None if it refuses the request or has no `/tokenize`."""


async def compare(engine: Tokenizes, expected: Expected) -> Comparison:
    """Compare the engine's tokens of every probe with `expected`.

    A probe that either side refuses is left out: what the engine refuses is never computed, and what cannot be read
    here is never matched. Raises what `engine.tokenize` raises.
    """
    compared, longest, digest = 0, 0, hashlib.sha256()
    difference = ""
    for probe, ours in expected.prompts:
        answer = await engine.tokenize(probe)
        if answer is None:
            continue
        theirs, longest = answer.tokens, answer.max_model_len
        if ours is None:
            continue
        compared += 1
        try:
            digest.update(pack_tokens(theirs))
        except TokenIdError as error:
            difference = difference or str(error)
            continue
        if ours != theirs:
            difference = difference or _difference(probe, ours, theirs)
    if difference:
        return Comparison(AgreementEvent.DIFFERENT, f"engine-{digest.hexdigest()[:25]}", difference, longest)
    if not compared:
        return Comparison(AgreementEvent.UNCHECKED, expected.fingerprint, "the engine's /tokenize answers nothing")
    return Comparison(AgreementEvent.EQUAL, expected.fingerprint, max_model_len=longest)


def _read(probe: dict[str, Any], tokenizer: Tokenizer) -> list[int] | None:
    try:
        if "prompt" in probe:
            special = probe.get("add_special_tokens", True)
            return tokenizer.encode(probe["prompt"], add_special_tokens=special)
        return chat_request_prompt(probe, tokenizer)
    except (PromptError, TokenizerError):
        return None


def _difference(probe: dict[str, Any], ours: list[int], theirs: list[int]) -> str:
    at = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    where = f"from token {min(len(ours), len(theirs)) if at is None else at} on"
    return f"{where}, {len(theirs)} tokens instead of {len(ours)}, of {probe}"
