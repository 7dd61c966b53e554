"""Random requests for every endpoint and field, with values that vLLM accepts and values that it refuses.

The same seed gives the same requests. Each is an ordinary request with one field changed, sometimes two, so that a
difference between answers can be attributed to it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Request = dict[str, Any]

ODD = [None, "x", "", 5, -1, 0, 1.5, True, [], [1], ["a"], {}, {"a": 1}, 2**70, "5"]
"""Values that fit few fields."""

IDS = [[], [5], [-1], [50258], [50259], ["a"], [5, 5], [1.5], None, "x", 5, [[5]], [5, 6, 7]]
FLAGS: list[Any] = [True, False, None, 1, 0, "yes", "no", "x", 2, []]
TEXTS = ["", "a", "a b c", None, 5, ["a"]]
FORMATS = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"name": "a"}},
    {"type": "xml"},
    {},
    "json",
    None,
    5,
    {"type": "structural_tag"},
]
STRUCTURED = [
    {},
    {"choice": ["a", "b"]},
    {"choice": []},
    {"json": {"type": "object"}},
    {"json": "{"},
    {"json": ""},
    {"json": 5},
    {"regex": "[ab]+"},
    {"regex": "("},
    {"regex": "[a"},
    {"json_object": True},
    {"json_object": False},
    {"grammar": ""},
    {"choice": ["a"], "regex": "a"},
    {"json_object": True, "choice": ["a"]},
    {"unknown": 1},
    {"choice": "a"},
    {"json": {"type": "nonsense"}},
    "x",
    5,
    None,
]

COMMON: Mapping[str, Sequence[Any]] = {
    "model": ["tiny-llama", "", None, "nope", 5, ["tiny-llama"]],
    "temperature": [0, 1, 2, 2.1, -0.1, 0.001, None, "1", "x", True, [], 1e9],
    "top_p": [0, 1, 0.5, 1.1, -1, None, "0.5", "x", []],
    "top_k": [-1, 0, 5, -2, 1.5, None, "3", 10**9, True],
    "min_p": [0, 1, -0.1, 1.1, None, "x"],
    "frequency_penalty": [0, 2, 2.1, -2.1, None, "x", "1"],
    "presence_penalty": [0, -2, 3, -3, None, {}, "1"],
    "repetition_penalty": [1, 0, -1, 0.5, 1e30, None, "x"],
    "seed": [0, -1, 2**63 - 1, 2**63, -(2**63) - 1, 1.0, 1.5, None, "5"],
    "n": [1, 2, 0, -1, 1.5, "2", None, 20000, True],
    "max_tokens": [0, 1, 2, 3, -1, 2.0, 2.5, "2", "x", 5000, 2049, True],
    "min_tokens": [0, 1, 3, 10, -1, None, "x", 1.5],
    "stop": ["a", ["a", "b"], [], "", [""], ["a"] * 4, ["a"] * 5, 5, [1], None, {}],
    "stop_token_ids": IDS,
    "allowed_token_ids": IDS,
    "logprob_token_ids": IDS,
    "bad_words": [["a"], [""], [], "x", None, [" a", "b"], [5], ["\n"]],
    "logit_bias": [
        {"5": 1},
        {"5": 101},
        {"-1": 1},
        {"999999": 1},
        {"x": 1, "y": 2},
        {"5": "a"},
        {"5": None},
        [],
        {},
        5,
    ],
    "ignore_eos": FLAGS,
    "skip_special_tokens": FLAGS,
    "spaces_between_special_tokens": FLAGS,
    "include_stop_str_in_output": FLAGS,
    "prompt_logprobs": [0, 1, 2, 20, 21, -1, -2, None, "x", 1.5, True],
    "truncate_prompt_tokens": [-1, 0, 1, 3, 2048, 2049, -2, None, "x", 1.5, 2**63],
    "truncation_side": ["left", "right", "up", None, 5],
    "response_format": FORMATS,
    "structured_outputs": STRUCTURED,
    "priority": [0, 5, -5, 2**63, None, "x", 1.5],
    "request_id": ["my-id", "", None, 5],
    "session_id": ["s", None, 5],
    "return_token_ids": FLAGS,
    "return_tokens_as_token_ids": FLAGS,
    "cache_salt": ["a", "", None, 5, "a/b", "x" * 129, "ü"],
    "kv_transfer_params": [{}, {"a": 1}, None, "x", []],
    "vllm_xargs": [{}, {"a": 1}, {"a": [1, "b"]}, {"a": 2**70}, {"a": {}}, {"a": None}, "x", None],
    "thinking_token_budget": [-1, 0, 5, -2, None, "x", 1.5, True],
    "stream_interval": [1, 2, 0, -1, None, "x"],
    "repetition_detection": [
        {},
        {"max_pattern_size": 2, "min_count": 2},
        {"max_pattern_size": 2},
        {"max_pattern_size": -1},
        "x",
        None,
    ],
    "routed_experts_prompt_start": [0, 1, 500, -1, None],
    "stream_options": [
        {},
        {"include_usage": True},
        {"include_usage": False},
        {"include_usage": None},
        {"continuous_usage_stats": True},
        {"include_usage": True, "continuous_usage_stats": True},
        {"include_usage": "x"},
        None,
        "x",
        [],
    ],
    "stream": [True, False, None, "true", "x", 1, []],
    "user": ["me", None, 5],
    "best_of": [1, 2, "x"],
    "use_beam_search": [False, None, "x"],
    "length_penalty": [1, 0, None, "x"],
    "add_special_tokens": FLAGS,
    "guided_json": [{"type": "object"}],
    "unknown_field": [1, None],
}

COMPLETION: Mapping[str, Sequence[Any]] = {
    **COMMON,
    "prompt": [
        None, "", "a", [], ["a", "b"], [""], ["a", ""], [1, 2, 3], [[1], [2, 3]], [[]], [-1], [50259], [1.5], ["a", 1],
        [1, "a"], [None], 5, {}, True, "\u00fc\U0001f642", [[1], "a"], [True], "x" * 300000,
    ],
    "echo": FLAGS,
    "logprobs": [0, 1, 5, 20, 21, -1, -2, None, "2", True, 1.5, []],
    "suffix": ["", "x", None, 5],
    "prompt_embeds": [None, "AAAA", ["AAAA"], [], 5],
}  # fmt: skip

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Hello there, how are you?"}

CHAT: Mapping[str, Sequence[Any]] = {
    **COMMON,
    "messages": [
        [], None, "x", 5, [5], [None], [{}], [{"role": "user"}], [{"content": "x"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": 5}], [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "user", "content": ["a", "b"]}],
        [{"role": "system", "content": "s"}, USER], [{"role": "developer", "content": "d"}, USER],
        [{"role": "wizard", "content": "x"}], [{"role": "", "content": "x"}], [{"role": 5, "content": "x"}],
        [{"role": "assistant", "content": None}], [{"role": "assistant"}], [{"role": "tool", "content": "x"}],
        [{"role": "function", "content": "x", "name": "f"}], [USER, {"role": "assistant", "content": "a"}],
        [USER, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                                                     "function": {"name": "f", "arguments": "{}"}}]}],
        [USER, {"role": "assistant", "content": "x", "tool_calls": "abc"}],
        [{"role": "user", "content": "x", "name": 5}], [{"role": "user", "content": {"a": 1}}],
    ],
    "logprobs": [True, False, None, 1, "x", 5, 0],
    "top_logprobs": [0, 1, 20, 21, -1, -2, None, "x", 1.5],
    "max_completion_tokens": [1, 2, 0, -1, 5000, None, "x", 1.5],
    "echo": FLAGS,
    "tools": [[], None, [TOOL], "x", [{}], [{"type": "function"}], [5]],
    "tool_choice": ["none", "auto", "required", None, "x", 5, {}, {"function": {}}, {"function": {"name": "f"}}],
    "parallel_tool_calls": FLAGS,
    "reasoning_effort": ["none", "low", "max", "huge", None, 5],
    "include_reasoning": FLAGS,
    "add_generation_prompt": FLAGS,
    "continue_final_message": FLAGS,
    "documents": [[], [{"title": "a", "text": "b"}], None, "x", [5], [{"a": 5}]],
    "chat_template": [None, "{{ messages[0].content }}", 5],
    "chat_template_kwargs": [{}, {"style": "x"}, None, "x", []],
    "media_io_kwargs": [{}, None, "x", {"image": {"a": 1}}],
    "mm_processor_kwargs": [{}, None, "x", {"a": 1}],
    "return_prompt_text": FLAGS,
}  # fmt: skip

RESPONSES: Mapping[str, Sequence[Any]] = {
    name: COMMON[name]
    for name in ("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
                 "logit_bias", "structured_outputs", "cache_salt", "vllm_xargs", "priority", "user", "stream",
                 "repetition_penalty", "request_id", "skip_special_tokens")
} | {
    "input": ["", "a", None, 5, [], [USER], [{"role": "system", "content": "s"}, USER],
              [USER, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]}],
              [USER, {"role": "assistant", "content": "b"}],
              [USER, {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
               {"type": "function_call_output", "call_id": "1", "output": "ok"}],
              [USER, {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "status": "x"}],
              [{"type": "function_call", "name": "f"}], [{"type": "function_call_output", "output": "ok"}],
              [{"type": "function_call_output", "call_id": "1", "output": 5}], [{"type": "reasoning", "summary": []}],
              [{"type": "reasoning"}], [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, USER],
              [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "status": "incomplete"}],
              [{"type": "item_reference", "id": "x"}], [{"type": "x"}], [{}], [5], ["a"], [None], [[]],
              [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 5}],
              [{"role": "user", "content": [{"type": "input_text", "text": "a"}], "name": "bob"}],
              [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
              [{"role": "user", "content": [{"type": "input_text", "text": 5}]}],
              [{"role": "user", "content": [{"type": "input_image", "image_url": "http://h/i.png"}]}],
              [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}],
              [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}],
              [USER, {"role": "assistant", "content": "begun", "status": "in_progress"}],
              [USER, {"type": "custom_tool_call", "call_id": "1", "name": "f", "input": "x"},
               {"type": "custom_tool_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "a"}]}],
              [{"type": "web_search_call", "id": "1", "status": "completed",
                "action": {"type": "search", "query": "q"}}], [{"type": "local_shell_call_output", "id": "1"}]],
    "instructions": ["be", "", None, 5],
    "max_output_tokens": [1, 2, 0, -1, 5000, "x", 1.5],
    "include": [["message.output_text.logprobs"], [], None, ["x"], "x"],
    "top_logprobs": [0, 1, None, "x"],
    "metadata": [{}, {"a": "b"}, {"a": 1}, None, "x"],
    "previous_response_id": ["resp_x", None, 5],
    "reasoning": [None, {"effort": "low"}, {"effort": "x"}, "x"],
    "service_tier": ["auto", "flex", "x", None],
    "store": FLAGS,
    "background": [True, False, None, "x"],
    "text": [None, {"format": {"type": "text"}}, {"format": {"type": "json_object"}}, {"verbosity": "low"},
             {"verbosity": "x"}, {"format": {"type": "x"}}, "x"],
    "tools": [[], [{"type": "function", "name": "f", "parameters": {}}], "x", [{}], [5], [{"type": "x"}],
              [{"type": "function"}], [{"type": "function", "name": "f", "parameters": "x"}],
              [{"type": "function", "name": 5, "parameters": {}}], [{"type": "web_search"}], [{"type": "mcp"}],
              [{"type": "custom", "name": "c"}], [{"type": "custom", "name": "c", "format": {"type": "grammar"}}],
              [{"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "f"}]}],
              [{"type": "namespace", "name": "n", "tools": []}], [{"type": "function", "name": "f", "strict": "x"}]],
    "tool_choice": ["none", "auto", "required", {"type": "function", "name": "f"}, "x", 5, {}, {"type": "x"},
                    {"type": "custom", "name": "c"}, {"type": "function", "name": "n__f"}, {"type": "function"}],
    "truncation": ["auto", "disabled", None, "x"],
    "presence_penalty": [0, 2, 3, None, "x"],
    "frequency_penalty": [0, -2, -3, None, "x"],
    "parallel_tool_calls": FLAGS,
    "max_tool_calls": [1, None, "x"],
    "enable_response_messages": [True, False, "x"],
    "prompt": [None, {"id": "a"}],
}  # fmt: skip

MESSAGES: Mapping[str, Sequence[Any]] = {
    "model": ["tiny-llama", "", None, "nope", 5],
    "max_tokens": [1, 2, 0, -1, None, 5000, "x", 1.5],
    "messages": [
        [], None, "x", [USER], [{"role": "user"}], [{"role": "system", "content": "s"}, USER],
        [{"role": "tool", "content": "x"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "x"}]}], [USER, {"role": "assistant", "content": "a"}],
        [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
         {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "ok"}]}],
        [{"role": "user", "content": [{"type": "tool_addition"}]}], [5], [{}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [5]}], [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "document"}]}],
        [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://h/i.png"}}]}],
        [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": "x"}]}],
        [USER, {"role": "assistant",
                "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]}],
        [USER, {"role": "system",
                "content": [{"type": "tool_addition", "tool": {"type": "tool_reference", "name": "f"}}]}],
        [USER, {"role": "system", "content": [{"type": "tool_removal", "tool": {"type": "tool_definition"}}]}],
        [{"role": "user", "content": [{"type": "tool_result", "content": [5]}]}],
        [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text"}]}]}, USER],
    ],
    "system": ["s", [{"type": "text", "text": "s"}], None, 5, []],
    "stop_sequences": [["a"], [], [""], ["a"] * 5, "a", None, [5]],
    "stream": [True, False, None, "x"],
    "temperature": [0, 1, 3, None, "x"],
    "top_p": [1, 0, None, "x"],
    "top_k": [1, -2, None, 1.5],
    "thinking": [{"type": "enabled", "budget_tokens": 1024}, {"type": "enabled", "budget_tokens": 5},
                 {"type": "disabled"}, {"type": "adaptive"}, {"type": "x"}, "x", None],
    "tools": [[], [{"name": "f", "input_schema": {}}], [{"name": "f"}], "x", None, [5], [{"input_schema": {}}],
              [{"name": "f", "input_schema": "x"}], [{"name": "f", "input_schema": {"type": 5}, "strict": "x"}]],
    "tool_choice": [{"type": "auto"}, {"type": "any"}, {"type": "none"}, {"type": "tool"}, {"type": "x"}, "x", None],
    "metadata": [{}, {"user_id": "x"}, "x", None],
    "cache_salt": ["a", "", None, 5],
    "output_config": [{"effort": "low"}, {"effort": "x"}, {"format": {"type": "json_schema", "schema": {}}}, None],
    "chat_template_kwargs": [{}, {"style": "x"}, "x", None],
}  # fmt: skip

TOKENIZE_TEXT: Mapping[str, Sequence[Any]] = {
    "prompt": ["", "a b", None, 5, [1], ["a"], "\u00fc", "<|im_start|>"],
    "model": ["tiny-llama", "", None, "nope", 5],
    "add_special_tokens": FLAGS,
    "return_token_strs": FLAGS,
}
TOKENIZE_CHAT: Mapping[str, Sequence[Any]] = {
    "messages": CHAT["messages"],
    "add_generation_prompt": FLAGS,
    "continue_final_message": FLAGS,
    "add_special_tokens": FLAGS,
    "return_token_strs": FLAGS,
    "chat_template": CHAT["chat_template"],
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "tools": CHAT["tools"],
}
DETOKENIZE: Mapping[str, Sequence[Any]] = {
    "tokens": [[], [1, 2], [-1], [50258], [999999], ["a"], "x", None, [1.5], [True], [2**63], [[1]]],
    "model": ["tiny-llama", "", None, "nope"],
}

BASES: Sequence[tuple[str, Request, Mapping[str, Sequence[Any]], int]] = (
    ("/v1/completions", {"prompt": "Hello world, this is", "max_tokens": 3}, COMPLETION, 10),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 3}, CHAT, 10),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 3}, RESPONSES, 4),
    ("/v1/messages", {"model": "tiny-llama", "messages": [USER], "max_tokens": 3}, MESSAGES, 4),
    ("/v1/messages/count_tokens", {"model": "tiny-llama", "messages": [USER]}, MESSAGES, 1),
    ("/tokenize", {"prompt": "Hello world"}, TOKENIZE_TEXT, 1),
    ("/tokenize", {"messages": [USER]}, TOKENIZE_CHAT, 1),
    ("/detokenize", {"tokens": [15496, 995]}, DETOKENIZE, 1),
    ("/invocations", {"messages": [USER], "max_tokens": 2}, CHAT, 1),
    ("/v1/chat/completions/batch", {"messages": [[USER], [USER]], "max_tokens": 2},
     {name: CHAT[name] for name in ("temperature", "n", "logprobs", "stop", "seed", "model", "cache_salt")}, 1),
)  # fmt: skip

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/ping", "/version", "/load", "/tokenize",
    "/detokenize", "/docs", "/openapi.json", "/is_sleeping", "/is_paused", "/v1/responses", "/v1/responses/resp_x",
    "/v1/responses/resp_x/cancel", "/v1/messages", "/nope", "/", "/v1", "/v1/models/x", "/v1/models/", "/health/",
    "/v1/embeddings", "/v1/chat/completions/", "/v1/audio/speech", "/metrics/x", "/v1/completions?a=1", "//v1/models",
    "/v1/completions/render", "/pooling", "/v1/load_lora_adapter", "/weight_info", "/get_world_size", "/redoc",
)  # fmt: skip
BODIES = (
    "", "null", "5", '"x"', "[]", "{", '{"prompt": "a"} x', '{"prompt": NaN}', '{"prompt": "a", "temperature": NaN}',
    '{"prompt": "a", "max_tokens": Infinity}', '{"prompt": "a", "top_p": -Infinity, "max_tokens": 1}',
    '{"prompt": "\\ud800", "max_tokens": 1}', '{"prompt": "a", "seed": 1e400, "max_tokens": 1}', "{'prompt': 'a'}",
    '{"prompt": "a", "prompt": "b", "max_tokens": 1}', '{"prompt": "a",}', "\x00", '{"prompt": "a\tb"}',
)  # fmt: skip
TYPES = (
    "application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "text/plain", "application/x-ndjson",
    "application/json;", "application/problem+json", "multipart/form-data",
    " application/json", "application/json ;a=b",
)  # fmt: skip


def agents_requests() -> Iterator[Request]:
    """One request for each value of the fields that hold an agent's turns and tools."""
    for path, base, fields, _ in BASES:
        names = {"/v1/responses": ("input", "tools"), "/v1/messages": ("messages", "system")}.get(path, ())
        for name in names:
            unused = {"tool_choice": "none"} if name == "tools" else {}  # or a parser would be needed
            for value in fields[name]:
                yield {"method": "POST", "path": path, "headers": {}, "body": {**base, name: value, **unused}}


class AnyRequests:
    """An endless, seeded source of requests: method, path, headers and body (JSON, or the text itself)."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def next(self) -> Request:
        kind = self._chance.random()
        if kind < 0.06:
            return self._raw()
        if kind < 0.12:
            method = self._chance.choice(["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
            headers = {"content-type": "application/json"} if method in ("POST", "PUT", "PATCH") else {}
            body = "{}" if headers else None
            return {"method": method, "path": self._chance.choice(PATHS), "headers": headers, "body": body}
        (path, base, fields, _), *_ = self._chance.choices(BASES, [weight for *_, weight in BASES])
        body = json.loads(json.dumps(base))
        for _ in range(2 if self._chance.random() < 0.3 else 1):
            name = self._chance.choice(sorted(fields))
            values = fields[name] if self._chance.random() < 0.85 else ODD
            body[name] = self._chance.choice(list(values))
        if fields in (COMPLETION, CHAT) and self._chance.random() < 0.3:
            body["stream"] = True
        if fields is CHAT and body.get("max_tokens", 3) is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = 2  # or it would run to the end of the context
        return {"method": "POST", "path": path, "headers": {}, "body": body}

    def _raw(self) -> Request:
        path = self._chance.choice(["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/responses"])
        if self._chance.random() < 0.5:
            return {"method": "POST", "path": path, "headers": {}, "body": self._chance.choice(BODIES)}
        headers = {"content-type": self._chance.choice(TYPES)}
        body = '{"prompt": "a b", "max_tokens": 1}' if path != "/tokenize" else '{"prompt": "a"}'
        return {"method": "POST", "path": path, "headers": headers, "body": body}
