"""Chat templates: messages in, the text of one prompt out, as transformers and vLLM render them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvcache.chat.content_format import content_format

DEFAULT_TEMPLATE = (
    "{% if tools %}{{ '<|tools|>\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% for call in message['tool_calls'] %}{{ call['function'] | tojson + '\\n' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""For a vocabulary that was never trained for chat, such as GPT-2's: `<|role|>`, a line break, the content, a line
break. Tools come first, one a line, and the calls of a message after its content. A conversation that grows keeps the
text of its earlier turns, so the KV cache of those turns is reused."""


_NO_VARIABLES: Mapping[str, Any] = {}


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the message says why, `reason` is what the template itself said."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class _GenerationMarker(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it only shows them. What
    is set within stays within, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


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
        environment = _environment()
        try:
            syntax = environment.parse(source)
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from None
        self.content_format = content_format(syntax)
        """The form of a message's content that it reads."""
        self.knows_developer = '"developer"' in source or "'developer'" in source
        """Whether it has words for the developer's role."""

    def takes_later_system_messages(self) -> bool:
        """Whether it renders a conversation with a second system message, as vLLM asks when it starts
        (`_detect_merge_inline_system`): without transformers' extensions, so a template that needs those does not."""
        turns = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
        plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])
        try:
            plain.from_string(self.source).render(messages=turns, add_generation_prompt=False)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return False
        return True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = _NO_VARIABLES,
    ) -> str:
        """Text of the prompt, for messages as `kvcache.chat.messages` reads them. `variables` go before special tokens
        of the same name. Raises `ChatTemplateError`, also for whatever the template itself raises."""
        if continue_final_message:
            if add_generation_prompt:
                raise ChatTemplateError(
                    "continue_final_message and add_generation_prompt are not compatible. Use continue_final_message "
                    "when you want the model to continue the final message, and add_generation_prompt when you want to "
                    "add a header that will prompt it to start a new assistant message instead."
                )
            messages, continued = _marked(messages)
        try:
            text = self._template.render(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **variables},
            )
        except Exception as error:  # a template is a program: any operation in it may fail in Python's own way
            raise ChatTemplateError(f"the chat template failed on these messages: {error}", str(error)) from error
        return _cut_at_mark(text, continued) if continue_final_message else text


_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""transformers' own: with its trailing space it shows whether a template trims what it is given."""


def _marked(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The messages with the mark behind the last text of the last one, and that text."""
    *before, last = messages
    content = last["content"]
    if isinstance(content, str):
        return [*before, {**last, "content": content + _MARK}], content
    for at in range(len(content) - 1, -1, -1):
        if "text" in content[at]:
            text = content[at]["text"]
            marked = [*content[:at], {**content[at], "text": text + _MARK}, *content[at + 1 :]]
            return [*before, {**last, "content": marked}], text
    raise ChatTemplateError("continue_final_message is set, but the last message has no text to continue")


def _cut_at_mark(text: str, continued: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or continued.strip() not in text:
        raise ChatTemplateError("continue_final_message is set, but the template does not write the last message out")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
