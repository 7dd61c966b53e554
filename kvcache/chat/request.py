"""A chat request's fields to the text of its prompt, as vLLM 0.32 reads them.

Router and emulated worker share this, so a request's prompt has the same tokens on both sides; the real engine's
answers hold it to vLLM (`tests/data/vllm/chat_prompts.json`, `tests/real_vllm`). A request that cannot be read exactly
(images, a forwarded prompt, a template that is not trusted) raises, and is then left to the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from jinja2.defaults import DEFAULT_NAMESPACE

from kvcache.chat.content_format import ContentFormat
from kvcache.chat.messages import MessageError, conversation, kind, without_developer
from kvcache.chat.template import ChatTemplate, ChatTemplateError

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_THINKING_EFFORTS = ("low", "medium", "high", "xhigh", "max")
"""The efforts of the Messages API."""

_REQUEST_TEMPLATES = 8
"""Templates of requests' own that are kept compiled."""

_NAMED = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "documents", "max_length", "padding",
        "return_dict", "return_tensors", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
"""Parameters of transformers' `apply_chat_template`: given as template variables, they do not reach the template."""

_UNREADABLE = frozenset({"conversation", "messages", "model_config", "return_assistant_tokens_mask", "self",
                         "tokenize", "tokenizer"})  # fmt: skip
"""Template variables that change how vLLM itself calls, or break the call."""

_UNSET = (None, "auto")
"""Values of a request that leave the engine's own setting in force."""


class ChatRequestError(ValueError):
    """A chat request's prompt cannot be read. `param` names the field; `reason` is the template's own complaint."""

    def __init__(self, message: str, param: str | None = "messages", reason: str = "") -> None:
        super().__init__(message)
        self.param = param
        self.reason = reason or message


def checked(fields: Mapping[str, Any], name: str, form: type, param: str = "messages") -> Any:
    """A field that is absent, null (both: None) or of this type. Raises `ChatRequestError` for any other value."""
    value = fields.get(name)
    if value is not None and not isinstance(value, form):
        raise ChatRequestError(f"{name} must be {_TYPES[form]}, not {kind(value)}", param)
    return value


_TYPES: Mapping[type, str] = {str: "a string", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the engine's command line says about chat prompts; the names are those of vLLM's flags."""

    chat_template: str | None = None
    """The template's source, in place of the tokenizer's own."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    exclude_tools_when_tool_choice_none: bool = False
    anthropic_disabled_thinking_effort: Literal["auto", "none", "low", "medium", "high", "xhigh", "max"] = "auto"
    trust_request_chat_template: bool = False
    """Render templates that requests bring along: they are programs, and their authors strangers."""

    def fingerprint_parts(self) -> list[bytes]:
        """What of it decides token ids; empty for the defaults."""
        parts = []
        if self.chat_template_content_format != "auto":
            parts.append(f"format {self.chat_template_content_format}".encode())
        if self.default_chat_template_kwargs:
            parts.append(json.dumps(self.default_chat_template_kwargs, sort_keys=True).encode())
        if self.exclude_tools_when_tool_choice_none:
            parts.append(b"exclude tools")
        if self.anthropic_disabled_thinking_effort != "auto":
            parts.append(f"disabled thinking {self.anthropic_disabled_thinking_effort}".encode())
        return parts


class ChatRenderer:
    """Renders chat requests by the templates of one tokenizer.

    `sources` are its templates by name: "default", and "tool_use" for requests with tools where there is one. Raises
    `ChatTemplateError` for one that does not compile.
    """

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], options: ChatOptions | None = None
    ) -> None:
        self._options = options = options or ChatOptions()
        self._special_tokens = special_tokens
        self._templates = {name: ChatTemplate(source, special_tokens) for name, source in sources.items()}
        self._given = None if options.chat_template is None else self._named(options.chat_template)
        self._requested: dict[str, ChatTemplate] = {}

    def render(self, fields: Mapping[str, Any], placeholder: str | None = None) -> str:
        """Text of the prompt of a chat request's JSON body. `placeholder` stands for each image
        (`kvcache.chat.messages.conversation`); None: images are refused. Raises `ChatRequestError`."""
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ChatRequestError("messages must be a list of at least one message")
        if _forwards_tokens(fields):
            raise ChatRequestError("a prompt forwarded by another engine is not read here", "kv_transfer_params")
        variables = self._variables(fields)
        tools = variables.pop("tools", None)
        documents = variables.pop("documents", None)
        template = self._template(fields, variables.pop("chat_template", None), tools)
        form = self._options.chat_template_content_format
        try:
            contents = template.content_format if form == "auto" else ContentFormat(form)
            read = conversation(messages, contents, placeholder)
            if not template.knows_developer and any(message["role"] == "developer" for message in read):
                read = without_developer(read)
            return template.render(
                read,
                tools=tools,
                documents=documents,
                add_generation_prompt=_flag(fields, "add_generation_prompt", True),
                continue_final_message=_flag(fields, "continue_final_message", False),
                variables={name: value for name, value in variables.items() if _reaches_the_template(name)},
            )
        except MessageError as error:
            raise ChatRequestError(str(error)) from None
        except ChatTemplateError as error:
            raise ChatRequestError(str(error), reason=error.reason) from None

    @cached_property
    def merges_system(self) -> bool:
        """Whether vLLM merges the system messages of a Messages request into one (`_should_merge_inline_system`):
        the template for requests with tools, or that for others, refuses a system message that is not the first."""
        default = self._given or self._templates.get("default")
        used = (default, self._given or self._templates.get("tool_use", default))
        return any(template is None or not template.takes_later_system_messages() for template in used)

    @cached_property
    def disabled_thinking_effort(self) -> str:
        """The effort that a Messages request asks for with `"thinking": {"type": "disabled"}`: the one that is set, or
        "none", or "low" if the template refuses "none" or renders it as another (`_probe_disabled_thinking_effort`)."""
        if self._options.anthropic_disabled_thinking_effort != "auto":
            return self._options.anthropic_disabled_thinking_effort
        without = self._greeting("none")
        return "low" if without is None or without in map(self._greeting, _THINKING_EFFORTS) else "none"

    def _greeting(self, effort: str) -> str | None:
        try:
            return self.render({"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": effort})
        except ChatRequestError:
            return None

    def _variables(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What the template may use by name, `tools`, `documents` and `chat_template` included: the engine's settings,
        before them the request's."""
        given = fields.get("chat_template_kwargs")
        if given is not None and not isinstance(given, Mapping):
            raise ChatRequestError(f"chat_template_kwargs must be an object, not {kind(given)}", "chat_template_kwargs")
        asked: dict[str, Any] = dict(given or {})
        if unreadable := _UNREADABLE & asked.keys():
            raise ChatRequestError(f"chat_template_kwargs holds {min(unreadable)!r}", "chat_template_kwargs")
        effort = fields.get("reasoning_effort")
        if effort is not None:
            if effort not in REASONING_EFFORTS:
                raise ChatRequestError(
                    f"reasoning_effort must be one of {', '.join(REASONING_EFFORTS)}", "reasoning_effort"
                )
            asked.setdefault("enable_thinking", effort != "none")
            asked["reasoning_effort"] = effort
        if (documents := fields.get("documents")) is not None:
            asked["documents"] = documents
        variables = dict(self._options.default_chat_template_kwargs)
        if (tools := self._tools(fields)) is not None:
            variables["tools"] = tools
        variables.update({name: value for name, value in asked.items() if value not in _UNSET})
        for name in ("tools", "documents"):
            _check_objects(variables.get(name), name)
        return variables

    def _tools(self, fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        tools = fields.get("tools")
        excluded = self._options.exclude_tools_when_tool_choice_none and fields.get("tool_choice") == "none"
        if tools is None or excluded:
            return None
        if not isinstance(tools, list):
            raise ChatRequestError(f"tools must be a list, not {kind(tools)}", "tools")
        return [_tool(tool) for tool in tools]

    def _template(self, fields: Mapping[str, Any], variable: object, tools: object) -> ChatTemplate:
        own = fields.get("chat_template")
        if not self._options.trust_request_chat_template and (own is not None or variable is not None):
            raise ChatRequestError("a template of the request's own is not trusted here", "chat_template")
        source = own or (variable if self._given is None else None)
        if source:
            if not isinstance(source, str):
                raise ChatRequestError(f"chat_template must be a string, not {kind(source)}", "chat_template")
            return self._request_template(source)
        if self._given is not None:
            return self._given
        template = self._templates.get("default")
        if tools is not None:
            template = self._templates.get("tool_use", template)
        if template is None:
            raise ChatRequestError("the tokenizer has no chat template")
        return template

    def _request_template(self, source: str) -> ChatTemplate:
        known = self._requested.get(source)
        if known is None:
            if len(self._requested) >= _REQUEST_TEMPLATES:
                self._requested.clear()
            try:
                known = self._requested[source] = self._named(source)
            except ChatTemplateError as error:
                raise ChatRequestError(str(error), "chat_template") from None
        return known

    def _named(self, source: str) -> ChatTemplate:
        """One of the tokenizer's templates where it has several and the source is only a name."""
        known = self._templates.get(source) if len(self._templates) > 1 else None
        return known or ChatTemplate(source, self._special_tokens)


def _reaches_the_template(name: str) -> bool:
    return name not in _NAMED and name not in DEFAULT_NAMESPACE


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise ChatRequestError(f"{name} must be true or false, not {kind(value)}", name)
    return value


def _forwards_tokens(fields: Mapping[str, Any]) -> bool:
    transfer = fields.get("kv_transfer_params")
    return transfer is not None and isinstance(transfer, Mapping) and transfer.get("prompt_token_ids") is not None


def _check_objects(value: object, name: str) -> None:
    if value is not None and not (isinstance(value, Sequence) and all(isinstance(one, Mapping) for one in value)):
        raise ChatRequestError(f"{name} must be a list of objects", name)


def _tool(tool: object) -> dict[str, Any]:
    """A tool as vLLM writes it out again: its own fields only, in its order, absent ones null."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatRequestError('a tool must look like {"type": "function", "function": {"name": "..."}}', "tools")
    description, parameters = function.get("description"), function.get("parameters")
    if not (isinstance(description, str | None) and isinstance(parameters, Mapping | None)):
        raise ChatRequestError("a tool's description is text and its parameters are an object", "tools")
    if tool.get("type", "function") != "function":
        raise ChatRequestError("a tool's type must be 'function'", "tools")
    deferred = _optional_flag(tool, "defer_loading")
    inner = _optional_flag(function, "defer_loading")
    strict = _optional_flag(function, "strict")
    read: dict[str, Any] = {"name": function["name"], "description": description, "parameters": parameters}
    if strict is not None:
        read["strict"] = strict
    if (defer := deferred if inner is None else inner) is not None:
        read["defer_loading"] = defer
    return {"type": "function", "function": read} | ({} if deferred is None else {"defer_loading": deferred})


def _optional_flag(fields: Mapping[str, Any], name: str) -> bool | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ChatRequestError(f"{name} must be true or false, not {kind(value)}", "tools")
    return value
