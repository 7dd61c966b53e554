"""`agents`: several agents at once, whose every request repeats the whole history, with tools. Two families:

- *coding*: a session of 40 turns, or as many as fit into a short context. It begins with a system prompt and tool
  definitions, which all sessions share, and a task with some files, which none shares. Each turn adds the assistant's
  call of a tool and the tool's result, whose length is log-normal. The last prompt fills most of the context.
- *tool_heavy*: a session of 8 turns about one of four products. The definitions of a product's tools fill a third of
  the context and are shared by all its sessions; results are short.

A public study of coding agents reports a median of 43 turns, 142,000 input tokens, and 96 % of the input found in the
cache. Sessions here have 40 turns, and lengths are shares of the context, so that the workload suits any model. One
call follows the other after the time of a tool (a median of 3 s, at most a minute), or, one time in ten, after that of
a person; these times, and the lengths of results, are assumptions.

There is a fixed number of agents, each of which begins a new session after its last one; `rate` decides how many. It is
an open loop: the next turn comes after a time that does not depend on the answer, so that a slow
strategy does not reduce the arrivals on which it is measured. For the same reason the assistant's turns in the history
are seeded text and not what the engine answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count as counter
from random import Random
from typing import Any

from bench.workloads.base import CHAT, MESSAGES, TimedRequest, Workload, WorkloadError, WorkloadSpec
from bench.workloads.conversation import WORDS

TURNS = {"coding": 40, "tool_heavy": 8}
TOOL_HEAVY = 0.5
"""Share of the sessions; of the requests it is a sixth, once agents are in the middle of theirs."""
PRODUCTS = 4
CONTEXT = 32_768
SMALLEST = 4_096
CHARS_PER_TOKEN = 5.2
JSON_CHARS_PER_TOKEN = 3.2
"""Of this text, and of definitions and calls, with GPT-2's vocabulary; with others prompts are somewhat shorter or
longer."""
FILLED = 0.9
"""Share of the context that the longest prompt fills at most, answer included."""
MAX_TOKENS = (32, 160)
SAID = (60, 240)
"""Characters that the assistant says before a call."""
CALL_TOKENS = 50
"""A call, and what a template writes around it."""
REQUESTS = 4_000
RATE = 12.0
PERSON = 0.1
"""Share of the pauses in which a person thinks."""
PERSON_SECONDS = (10.0, 60.0)
TOOL_SECONDS = (0.7, 0.9)
"""Mean and standard deviation of the logarithm of a tool's time."""
GENERATION_SECONDS = 1.0
MEAN_PAUSE = PERSON * sum(PERSON_SECONDS) / 2 + (1 - PERSON) * (
    GENERATION_SECONDS + math.exp(TOOL_SECONDS[0] + TOOL_SECONDS[1] ** 2 / 2)
)


@dataclass(frozen=True, slots=True)
class _Family:
    """Lengths in characters."""

    name: str
    system: int
    tools: int
    """All definitions together."""
    task: int
    result: int
    """Mean of a tool's result."""
    spread: float
    """Standard deviation of its logarithm."""
    turns: int


def _families(context: int) -> tuple[_Family, ...]:
    """The families for a context of so many tokens."""
    chars = context * FILLED * CHARS_PER_TOKEN
    coding, heavy = TURNS["coding"], TURNS["tool_heavy"]
    step = int((CALL_TOKENS + sum(SAID) / 2 / CHARS_PER_TOKEN) * CHARS_PER_TOKEN)

    def share(part: float) -> int:
        return int(chars * part)

    return (
        _Family("coding", share(0.03), share(0.06), share(0.05), max(share(0.72 / coding) - step, 40), 1.0, coding),
        _Family("tool_heavy", share(0.01), share(0.33), share(0.01), share(0.012), 0.5, heavy),
    )


def _text(random: Random, chars: int) -> str:
    """About `chars` characters: a word has 4.5 on average, and a space."""
    words = random.choices(WORDS, k=max(round(chars / 5.5), 1))
    return " ".join(words).capitalize() + "."


def _tools(random: Random, chars: int) -> list[dict[str, Any]]:
    """Definitions of ten functions, about `chars` characters together."""
    each = max(chars // 10 - 260, 20)
    tools = []
    for number in range(10):
        properties = {
            name: {"type": kind, "description": _text(random, each // 4)}
            for name, kind in (("path", "string"), ("query", "string"), ("limit", "integer"))
        }
        schema = {"type": "object", "properties": properties, "required": ["path"]}
        name = f"{random.choice(WORDS)}_{random.choice(WORDS)}_{number}"
        tools.append({"name": name, "description": _text(random, each // 4), "parameters": schema})
    return tools


@dataclass(slots=True)
class _Turn:
    """One step of a session: what the assistant calls and what the tool answers."""

    say: str
    tool: str
    arguments: dict[str, Any]
    call_id: str
    result: str


@dataclass(frozen=True, slots=True)
class _Prompt:
    """All that one request says, in no API's form. The history is shared by the prompts of a session and only grows."""

    system: str
    tools: Sequence[Mapping[str, Any]]
    task: str
    history: Sequence[_Turn]
    turns: int
    """How many of the history it has."""
    max_tokens: int

    def chat(self) -> dict[str, Any]:
        """As the body of a chat request."""
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.task},
        ]
        for turn in self.history[: self.turns]:
            function = {"name": turn.tool, "arguments": json.dumps(turn.arguments)}
            call = {"id": turn.call_id, "type": "function", "function": function}
            messages.append({"role": "assistant", "content": turn.say, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": turn.call_id, "content": turn.result})
        tools = [{"type": "function", "function": tool} for tool in self.tools]
        return {"messages": messages, "tools": tools, "max_tokens": self.max_tokens, "ignore_eos": True}

    def messages(self) -> dict[str, Any]:
        """As the body of a request of the Messages API, which has no `ignore_eos`."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": self.task}]
        for turn in self.history[: self.turns]:
            use = {"type": "tool_use", "id": turn.call_id, "name": turn.tool, "input": turn.arguments}
            result = {"type": "tool_result", "tool_use_id": turn.call_id, "content": turn.result}
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.say}, use]})
            messages.append({"role": "user", "content": [result]})
        tools = [
            {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
            for tool in self.tools
        ]
        return {"system": self.system, "messages": messages, "tools": tools, "max_tokens": self.max_tokens}


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all sessions of a family, or of one of its products, begin with."""

    family: _Family
    system: str
    tools: list[dict[str, Any]]


def _shared(seed: int, context: int) -> dict[str, list[_Shared]]:
    made: dict[str, list[_Shared]] = {}
    for family in _families(context):
        products = PRODUCTS if family.name == "tool_heavy" else 1
        for product in range(products):
            random = Random(f"agents {seed} {family.name} {product}")
            one = _Shared(family, _text(random, family.system), _tools(random, family.tools))
            made.setdefault(family.name, []).append(one)
    return made


def _pause(random: Random) -> float:
    """Seconds until the next turn: generation and a tool, or a person."""
    if random.random() < PERSON:
        return random.uniform(*PERSON_SECONDS)
    return GENERATION_SECONDS + min(random.lognormvariate(*TOOL_SECONDS), 60.0)


def _session(shared: _Shared, seed: int, number: int, starts: float, longest: float) -> Iterator[tuple[float, _Prompt]]:
    """(arrival, prompt) of each turn of one session. `longest`: tokens that a prompt may have."""
    family = shared.family
    random = Random(f"agents {seed} session {number}")
    task, history, at = _text(random, family.task), list[_Turn](), starts
    size = (len(shared.system) + len(task)) / CHARS_PER_TOKEN + len(json.dumps(shared.tools)) / JSON_CHARS_PER_TOKEN
    for turn in range(family.turns):
        yield at, _Prompt(shared.system, shared.tools, task, history, turn, random.randint(*MAX_TOKENS))
        chars = min(int(random.lognormvariate(0.0, family.spread) * family.result / 1.65), family.result * 8)
        tool = random.choice(shared.tools)["name"]
        path = f"src/{random.choice(WORDS)}/{random.choice(WORDS)}.py"
        say = _text(random, random.randint(*SAID))
        step = _Turn(say, tool, {"path": path}, f"call_{number}_{turn}", _text(random, chars))
        size += (len(step.say) + len(step.result)) / CHARS_PER_TOKEN + CALL_TOKENS
        if size > longest:
            return  # the context is full: an agent would begin anew, with a summary
        history.append(step)
        at += _pause(random)


def agents(spec: WorkloadSpec) -> Workload:
    """The workload of these parameters. Raises `WorkloadError` for a context that is too short."""
    count, rate, context = spec.limit or REQUESTS, spec.rate or RATE, spec.context or CONTEXT
    if context < SMALLEST:
        raise WorkloadError(f"agents needs a context of {SMALLEST} tokens or more, not {context}")
    longest = context * FILLED - MAX_TOKENS[1]
    several = max(round(rate * MEAN_PAUSE), 1)

    def requests() -> Iterator[TimedRequest]:
        shared = _shared(spec.seed, context)
        random = Random(f"agents {spec.seed}")
        sessions = counter()

        def session(starts: float) -> Iterator[tuple[float, _Prompt]]:
            family = "tool_heavy" if random.random() < TOOL_HEAVY else "coding"
            return _session(random.choice(shared[family]), spec.seed, next(sessions), starts, longest)

        # (arrival, number of the agent, its prompt, the turns to come); numbers break ties
        due: list[tuple[float, int, _Prompt, Iterator[tuple[float, _Prompt]]]] = []
        for agent in range(several):
            turns = session(random.uniform(0.0, MEAN_PAUSE))
            at, prompt = next(turns)
            heappush(due, (at, agent, prompt, turns))
        for index in range(count):
            at, agent, prompt, turns = heappop(due)
            yield _request(index, at, prompt, spec.api)
            following = next(turns, None)
            if following is None:
                turns = session(at + _pause(random))
                following = next(turns)
            heappush(due, (following[0], agent, following[1], turns))

    config = {
        "rate": rate, "agents": several, "context": context, "api": spec.api, "turns": TURNS, "tool_heavy": TOOL_HEAVY
    }  # fmt: skip
    return Workload("agents", spec.seed, count, config, requests)


def _request(index: int, at: float, prompt: _Prompt, api: str) -> TimedRequest:
    path, body = (CHAT, prompt.chat()) if api == "chat" else (MESSAGES, prompt.messages())
    return TimedRequest(index, at, path, body, prompt.max_tokens)
