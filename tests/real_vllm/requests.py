"""Random requests of every kind that changes a prompt, for comparing the router with the engine.

Not covered: images, audio and other inputs that are no text.
"""

from __future__ import annotations

import json
import random
from typing import Any

_TEXT = (
    "the cache of a worker holds blocks that were computed before and a router sends requests where they are "
    'Ünïcödé 日本語 🙂 {"json": [1, 2]} <|im_end|> </think> \t tab  two-spaces x-anthropic-billing-header: cch=1 '
    "'quoted' \"double\" newline\nhere & <b>html</b>"
)
WORDS = _TEXT.split(" ")

TEMPLATES = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{{ tools | tojson }}{{ documents | tojson }}"
    "{{ reasoning_effort }}{{ enable_thinking }}{{ style }}{{ add_generation_prompt }}",
    "{{ bos_token }}{% set ms = messages[1:] %}{% for m in ms %}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}<{{ c.text }}>{% endfor %}"
    "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    "{% macro show(body) %}{% for c in body %}{{ c | tojson }};{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ m.role }} {{ show(m.content) }}{% endfor %}{{ style }}",
    "{% for m in messages %}{{ m.role }}|{{ m.content | trim }}|{{ m.name }}\n{% endfor %}{{ 'developer' }}"
    "{% generation %}{% set x = 1 %}g{% endgeneration %}{{ x is defined }}{{ range(3) | list }}",
)
"""Of requests' own: they read the content as parts, write everything out, or trim."""


class Requests:
    """Chat and completion requests, reproducible by their seed. `templates`: also templates of the requests' own."""

    def __init__(self, seed: int, model: str, *, templates: bool = True) -> None:
        self._random = random.Random(seed)
        self._model = model
        self._templates = templates

    def chat(self) -> dict[str, Any]:
        """The body of one chat request."""
        chance = self._chance
        body: dict[str, Any] = {"model": self._model, "messages": self._messages(), "max_tokens": 1, "temperature": 0}
        if chance(0.4):
            body["tools"] = [self._tool() for _ in range(self._random.randint(1, 3))]
            if chance(0.4):
                name = body["tools"][0]["function"]["name"]
                named = {"type": "function", "function": {"name": name}}
                body["tool_choice"] = self._random.choice(["none", "auto", "required", named])
        if chance(0.15):
            body["reasoning_effort"] = self._random.choice(["none", "minimal", "low", "medium", "high", "xhigh", "max"])
        if chance(0.2):
            body["chat_template_kwargs"] = self._variables()
        if chance(0.1):
            body["documents"] = [{"title": self._text(2), "text": self._text(6)}, {"text": self._text(3)}][
                : self._upto(2)
            ]
        if chance(0.15):
            body["add_generation_prompt"] = self._random.choice([True, False])
        if chance(0.12):
            body["continue_final_message"] = True
            body["add_generation_prompt"] = False
        if chance(0.1):
            body["add_special_tokens"] = self._random.choice([True, False])
        if chance(0.1):
            body["truncate_prompt_tokens"] = self._random.choice([-1, 1, 7, 32, 33, 100, 2000])
            if chance(0.5):
                body["truncation_side"] = self._random.choice(["left", "right"])
        if self._templates and chance(0.15):
            body["chat_template"] = self._random.choice(TEMPLATES)
        return body

    def completion(self) -> dict[str, Any]:
        """The body of one completion request."""
        body: dict[str, Any] = {"model": self._model, "prompt": self._prompt(), "max_tokens": 1, "temperature": 0}
        if self._chance(0.2):
            body["add_special_tokens"] = self._random.choice([True, False])
        if self._chance(0.2):
            body["truncate_prompt_tokens"] = self._random.choice([-1, 1, 5, 16, 2000])
            if self._chance(0.5):
                body["truncation_side"] = self._random.choice(["left", "right"])
        return body

    # --- parts of requests ---

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _upto(self, most: int) -> int:
        return self._random.randint(1, most)

    def _text(self, words: int = 12) -> str:
        return " ".join(self._random.choice(WORDS) for _ in range(self._random.randint(0, words)))

    def _prompt(self) -> Any:
        text = self._text(60) or "x"
        ids = [self._random.randrange(50_000) for _ in range(self._upto(40))]
        return self._random.choice([text, text, [text, self._text(9) or "y"], ids, [ids, ids[:5]]])

    def _variables(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "enable_thinking": self._random.choice([True, False, None]),
            "style": self._random.choice(["terse", {"b": 1, "a": [None, 2.5]}, "auto", None]),
            "current_date": "2026-01-02",
            "reasoning_effort": "low",
            "bos_token": "BOS",
            "max_length": 5,
            "range": 3,
            "documents": [{"text": "from the variables"}],
            "add_generation_prompt": False,
            "unused": 1,
        }
        names = self._random.sample(sorted(values), self._upto(3))
        return {name: values[name] for name in names}

    def _messages(self) -> list[dict[str, Any]]:
        chance = self._chance
        messages: list[dict[str, Any]] = []
        for role in ("system", "developer"):
            if chance(0.35):
                messages.append({"role": role, "content": self._content(parts=True)})
        if messages and messages[-1]["role"] == "developer" and chance(0.2):
            messages[-1]["tools"] = [self._tool()]
        for _ in range(self._upto(4)):
            messages += self._turn()
        if chance(0.1):
            messages.insert(self._upto(len(messages)), {"role": "system", "content": self._text()})
        if chance(0.05):
            messages.append({"role": "critic", "content": self._text(), "mood": "grim"})
        return messages

    def _turn(self) -> list[dict[str, Any]]:
        chance = self._chance
        user: dict[str, Any] = {"role": "user", "content": self._content(parts=True)}
        if chance(0.1):
            user["name"] = "bob"
        if chance(0.4):
            return [user]
        assistant: dict[str, Any] = {"role": "assistant", "content": self._content(parts=chance(0.3))}
        for name, probability in (("reasoning", 0.2), ("reasoning_content", 0.15), ("refusal", 0.1), ("name", 0.05)):
            if chance(probability):
                assistant[name] = self._text(5)
        if chance(0.4):
            return [user, assistant]
        calls = [self._call() for _ in range(self._random.randint(0, 2))]
        assistant["tool_calls"] = calls
        if chance(0.4):
            assistant["content"] = None
        if chance(0.2):
            del assistant["content"]
        return [user, assistant, *(self._result(call) for call in calls)]

    def _content(self, *, parts: bool) -> Any:
        if not parts or self._chance(0.6):
            return self._text()
        return [self._part() for _ in range(self._random.randint(0, 3))]

    def _part(self) -> Any:
        text = self._text(6)
        return self._random.choice(
            [
                {"type": "text", "text": text},
                {"text": text, "type": "text", "cache_control": {"type": "ephemeral"}},
                text,
                {"type": "refusal", "refusal": text},
                {"type": "thinking", "thinking": text, "closed": True},
                {"type": "input_text", "text": text},
            ]
        )

    def _call(self) -> dict[str, Any]:
        arguments = self._random.choice(
            ['{"city": "Zürich", "days": 3}', '{"b": {"c": [1, 2.0, null]}, "a": true}', "", "{}", "[1]", "not json",
             '{"n": 1e3, "big": 12345678901234567890}', " {\"x\": \"\\u00e9\\n\"} ", "null"]
        )  # fmt: skip
        call: dict[str, Any] = {
            "type": "function",
            "id": f"call_{self._upto(99)}",
            "function": {"name": self._random.choice(["get_weather", "search"]), "arguments": arguments},
        }
        if self._chance(0.2):
            call["index"] = 0
            call["function"]["note"] = "x"
        return call

    def _result(self, call: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"ok": True})}
        if self._chance(0.3):
            result["content"] = [{"type": "text", "text": self._text(4)}, {"type": "text", "text": "b"}][
                : self._upto(2)
            ]
        if self._chance(0.2):
            result["name"] = call["function"]["name"]
        return result

    def _tool(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self._random.choice(["get_weather", "search"])}
        optional: dict[str, Any] = {
            "description": self._text(5),
            "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": [1, 2.5, None]}}},
            "strict": self._random.choice([True, False, None]),
            "x-vendor": 1,
            "defer_loading": True,
        }
        for name, value in optional.items():
            if self._chance(0.4):
                function[name] = value
        tool: dict[str, Any] = {"function": function, "type": "function"}
        if self._chance(0.1):
            tool["defer_loading"] = False
        if self._chance(0.1):
            tool["note"] = "dropped"
        return tool
