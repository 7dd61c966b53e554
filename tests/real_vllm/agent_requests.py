"""Random requests of the Messages API and of the Responses API, of every kind that changes a prompt.

Not covered: images and files, whose prompts the router leaves to the engine; responses that continue a stored one.
"""

from __future__ import annotations

import json
import random
from typing import Any

from tests.real_vllm.requests import WORDS

ARGUMENTS = (
    '{"city": "Zürich", "days": 3}',
    '{"b": {"c": [1, 2.0, null, {"d": []}]}, "a": true}',
    "",
    "{}",
    "[1]",
    "not json",
    '{"n": 1e3, "big": 12345678901234567890}',
    ' {"x": "\\u00e9\\n"} ',
)
"""Of tool calls; the Messages API takes objects only."""

BILLING = "x-anthropic-billing-header: cch=1;"


class AgentRequests:
    """Reproducible by their seed. `output`: tokens that each asks for."""

    def __init__(self, seed: int, model: str, output: int = 1) -> None:
        self._random = random.Random(seed)
        self._model = model
        self._output = output

    def messages(self) -> dict[str, Any]:
        """The body of one request of the Messages API."""
        chance = self._chance
        body: dict[str, Any] = {"model": self._model, "max_tokens": self._output, "temperature": 0}
        if chance(0.6):
            body["system"] = self._pick([self._text(), [self._block_text() for _ in range(self._upto(3))], BILLING])
        if chance(0.5):
            body["tools"] = [self._anthropic_tool(name) for name in ("get_weather", "search")[: self._upto(2)]]
            if chance(0.4):
                kinds: list[dict[str, Any]] = [{"type": "auto"}, {"type": "any"}, {"type": "none"}]
                named = {"type": "tool", "name": body["tools"][0]["name"], "disable_parallel_tool_use": True}
                body["tool_choice"] = self._pick([*kinds, named])
        elif chance(0.1):
            body["tools"] = []
        messages: list[dict[str, Any]] = []
        for _ in range(self._upto(4)):
            messages += self._anthropic_turn(declared=bool(body.get("tools")))
        body["messages"] = messages
        if chance(0.2):
            body["output_config"] = {"effort": self._pick(["low", "medium", "high", "xhigh", "max"])}
        if chance(0.3):
            body["thinking"] = self._pick(
                [
                    {"type": "disabled"},
                    {"type": "adaptive", "display": "omitted"},
                    {"type": "enabled", "budget_tokens": 1024},
                ]
            )
            if body["thinking"]["type"] == "enabled":
                body["max_tokens"] = 1025
        if chance(0.15):
            body["chat_template_kwargs"] = self._variables()
        return body

    def responses(self) -> dict[str, Any]:
        """The body of one request of the Responses API."""
        chance = self._chance
        body: dict[str, Any] = {"model": self._model, "max_output_tokens": self._output, "temperature": 0}
        if chance(0.5):
            body["instructions"] = self._text()
        body["input"] = (self._text() or "x") if chance(0.2) else self._items()
        if chance(0.5):
            body["tools"] = [self._openai_tool() for _ in range(self._upto(3))]
            if chance(0.3):
                body["tool_choice"] = self._pick(["none", "auto"])
        if chance(0.25):
            body["reasoning"] = self._pick([{"effort": effort} for effort in ("none", "minimal", "low", "high", None)])
        if chance(0.15):
            body["chat_template_kwargs"] = self._variables()
        if chance(0.15):
            body["truncation"] = self._pick(["auto", "disabled"])
        if chance(0.1):
            body["store"] = False
        return body

    # --- parts of both ---

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _upto(self, most: int) -> int:
        return self._random.randint(1, most)

    def _pick(self, values: list[Any]) -> Any:
        return self._random.choice(values)

    def _text(self, words: int = 12) -> str:
        return " ".join(self._random.choice(WORDS) for _ in range(self._random.randint(0, words)))

    def _variables(self) -> dict[str, Any]:
        values = {"enable_thinking": False, "style": {"b": 1, "a": [None, 2.5]}, "current_date": "2026-01-02"}
        return {name: values[name] for name in self._random.sample(sorted(values), self._upto(2))}

    def _schema(self) -> Any:
        return self._pick(
            [
                {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": [1, 2.5, None]}}},
                {"properties": {"nested": {"type": "object", "properties": {"x": {"type": "array", "items": {}}}}}},
                {},
            ]
        )

    # --- the Messages API ---

    def _anthropic_tool(self, name: str) -> dict[str, Any]:
        tool: dict[str, Any] = {"name": name, "input_schema": self._schema()}
        for field, value in (("description", self._text(5)), ("strict", True), ("defer_loading", True), ("note", 1)):
            if self._chance(0.3):
                tool[field] = value
        return tool

    def _block_text(self) -> dict[str, Any]:
        block: dict[str, Any] = {"type": "text", "text": self._pick([self._text(6), self._text(6), BILLING, ""])}
        return block | ({"cache_control": {"type": "ephemeral"}} if self._chance(0.3) else {})

    def _anthropic_turn(self, *, declared: bool) -> list[dict[str, Any]]:
        chance = self._chance
        user: dict[str, Any] = {"role": "user", "content": self._text()}
        if chance(0.4):
            user["content"] = [self._block_text() for _ in range(self._random.randint(0, 3))]
        turn = [user]
        if chance(0.12):
            turn.append({"role": "system", "content": self._pick([self._text(5), [self._block_text()], BILLING])})
        if declared and chance(0.08):
            change = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "get_weather"}}
            turn.append({"role": "system", "content": [change]})
        if chance(0.35):
            return turn
        blocks: list[dict[str, Any]] = []
        if chance(0.35):
            blocks.append({"type": "thinking", "thinking": self._text(6), "signature": "s"})
        if chance(0.1):
            blocks.append({"type": "redacted_thinking", "data": "opaque"})
        blocks += [self._block_text() for _ in range(self._random.randint(0, 2))]
        calls = [self._tool_use() for _ in range(self._random.randint(0, 2))]
        turn.append({"role": "assistant", "content": [*blocks, *calls] if chance(0.8) else self._text()})
        if turn[-1]["content"] and isinstance(turn[-1]["content"], list) and calls:
            results = [self._tool_result(call) for call in calls]
            after = [self._block_text()] if chance(0.4) else []
            turn.append({"role": "user", "content": [*results, *after]})
        return turn

    def _tool_use(self) -> dict[str, Any]:
        given = [json.loads(text) for text in ARGUMENTS if text.strip().startswith("{")]
        name = self._pick(["get_weather", "search"])
        return {"type": "tool_use", "id": f"toolu_{self._upto(99)}", "name": name, "input": self._pick(given)}

    def _tool_result(self, call: dict[str, Any]) -> dict[str, Any]:
        content: Any = self._pick(
            [
                self._text(5),
                [{"type": "text", "text": self._text(4)}, {"type": "text", "text": "b"}],
                [{"type": "tool_reference", "tool_name": "search"}],
                [],
                None,
            ]
        )
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": content}
        return result | ({"is_error": True} if self._chance(0.2) else {})

    # --- the Responses API ---

    def _openai_tool(self) -> Any:
        name = self._pick(["get_weather", "search"])
        function: dict[str, Any] = {"type": "function", "name": name, "parameters": self._schema()}
        for field, value in (("description", self._text(5)), ("strict", False), ("defer_loading", True), ("note", 1)):
            if self._chance(0.3):
                function[field] = value
        member = {"type": "function", "name": "read", "parameters": {"type": "object"}, "description": "of a space"}
        return self._pick(
            [
                function,
                function,
                {"type": "function", "name": name},
                {"type": "custom", "name": "shell", "description": self._text(4)},
                {"type": "custom", "name": "shell", "format": {"type": "text"}},
                {"type": "namespace", "name": "files", "description": "x", "tools": [member]},
                {"type": "web_search_preview"},
            ]
        )

    def _items(self) -> list[dict[str, Any]]:
        chance = self._chance
        items: list[dict[str, Any]] = []
        if chance(0.3):
            items.append({"role": self._pick(["system", "developer"]), "content": self._said(parts=True)})
        for _ in range(self._upto(4)):
            items += self._openai_turn()
        if chance(0.15):
            status = self._pick(["in_progress", "incomplete", "completed"])
            items.append(self._answer() | {"status": status})
        return items

    def _said(self, *, parts: bool) -> Any:
        if not parts or self._chance(0.5):
            return self._text()
        return [{"type": "input_text", "text": self._text(6), "note": 1} for _ in range(self._random.randint(0, 3))]

    def _openai_turn(self) -> list[dict[str, Any]]:
        chance = self._chance
        user: dict[str, Any] = {"role": "user", "content": self._said(parts=True)}
        if chance(0.3):
            user["type"] = "message"
        if chance(0.35):
            return [user]
        turn = [user]
        if chance(0.35):
            turn.append(self._reasoning())
        if chance(0.6):
            turn.append(self._answer())
        calls = [self._call() for _ in range(self._random.randint(0, 2))]
        return [*turn, *calls, *(self._result(call) for call in calls)]

    def _reasoning(self) -> dict[str, Any]:
        item: dict[str, Any] = {"type": "reasoning", "summary": []}
        if self._chance(0.4):
            item["summary"] = [{"type": "summary_text", "text": self._text(4)}]
        if self._chance(0.6):
            item["content"] = [{"type": "reasoning_text", "text": self._text(6)} for _ in range(self._upto(2))]
        return item | ({"id": "rs_1"} if self._chance(0.5) else {})

    def _answer(self) -> Any:
        text = self._text(6)
        output: dict[str, Any] = {"type": "output_text", "text": text}
        return self._pick(
            [
                {"role": "assistant", "content": text},
                {"role": "assistant", "content": text, "type": "message"},
                {"role": "assistant", "content": [output], "type": "message"},
                {
                    "role": "assistant",
                    "content": [output | {"annotations": []}, {"type": "output_text", "text": "b"}],
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                },
                {"role": "assistant", "content": [{"type": "input_text", "text": text}]},
            ]
        )

    def _call(self) -> dict[str, Any]:
        call_id = f"call_{self._upto(99)}"
        if self._chance(0.2):
            return {"type": "custom_tool_call", "call_id": call_id, "name": "shell", "input": self._text(4)}
        call = {"type": "function_call", "call_id": call_id, "name": "search", "arguments": self._pick([*ARGUMENTS])}
        if self._chance(0.2):
            call["namespace"] = "files"
        return call | ({"id": "fc_1", "status": "completed"} if self._chance(0.4) else {})

    def _result(self, call: dict[str, Any]) -> dict[str, Any]:
        name = "custom_tool_call_output" if call["type"] == "custom_tool_call" else "function_call_output"
        output: Any = self._text(5)
        if self._chance(0.3):
            output = [{"type": "input_text", "text": self._text(4)}, {"type": "input_text", "text": "b"}]
        result = {"type": name, "call_id": call["call_id"], "output": output}
        return result | ({"id": "fco_1", "status": "completed"} if self._chance(0.2) else {})
