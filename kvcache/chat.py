"""Chat templates: messages in, the text of one prompt out, as transformers and vLLM render them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""For a vocabulary that was never trained for chat, such as GPT-2's: `<|role|>`, a line break, the content, a line
break. A conversation that grows keeps the text of its earlier turns, so the KV cache of those turns is reused."""


_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""The types of content parts that are text, and the field that holds it."""


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the message says why."""


class _GenerationMarker(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: unlike jinja2's own it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    # Templates come with models, hence from strangers: the sandbox keeps them from reaching Python's insides.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationMarker]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. `special_tokens` are the names it may use: bos_token, eos_token and so on.

    Raises `ChatTemplateError` when the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Text of the prompt. Raises `ChatTemplateError`, also for whatever the template itself raises."""
        try:
            return self._template.render(
                messages=[flat_message(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: any operation in it may fail in Python's own way
            raise ChatTemplateError(f"the chat template failed on these messages: {error}") from error


def flat_message(message: object) -> dict[str, Any]:
    """One message with its content as a string: parts are joined with line breaks, no content is "" (as in vLLM).

    Raises `ChatTemplateError` for what is no message, or holds anything but text.
    """
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"a message must be an object, not {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ChatTemplateError("a message needs a role, a string that is not empty")
    return {**message, "content": _flat_content(message.get("content"))}


def _flat_content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatTemplateError(f"a message's content must be a string or a list of parts, not {_kind(content)}")
    return "\n".join(_part_text(part) for part in content)


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    field = _TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    text = part.get(field) if isinstance(part, Mapping) and field else None
    if not isinstance(text, str):
        what = f"one of type {kind[:40]!r}" if isinstance(kind, str) else _kind(part)
        raise ChatTemplateError(f'a part of a content must look like {{"type": "text", "text": "..."}}, not {what}')
    return text


def _kind(value: object) -> str:
    """A value by its type alone: what a client sent may be huge, or nested too deep to be written out."""
    return type(value).__name__
