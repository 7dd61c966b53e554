"""Which form of `content` a chat template reads: text, or OpenAI's list of parts.

vLLM decides it from the template's syntax alone (`--chat-template-content-format auto`), and a template sees another
prompt when the decision falls otherwise, so this comes to the same decision for the same source (checked against vLLM
0.32: `tests/data/vllm/chat_prompts.json`).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from jinja2 import nodes


class ContentFormat(StrEnum):
    """vLLM's names for the two forms."""

    STRING = "string"
    """The parts' texts, joined with line breaks."""
    OPENAI = "openai"
    """A list of `{"type": "text", "text": ...}`."""


class _UnfollowedError(Exception):
    """An assignment or a loop that vLLM's search gives up on: it then takes the content as text."""


def content_format(template: nodes.Template) -> ContentFormat:
    """OPENAI when the template loops over the content of a message, directly or through a macro's parameter."""
    try:
        found = any(_content_loops(template))
    except _UnfollowedError:
        found = False
    return ContentFormat.OPENAI if found else ContentFormat.STRING


def _content_loops(template: nodes.Template) -> Iterator[bool]:
    """Of each loop: whether it goes over a message's content."""
    messages = _message_names(template)
    parameters = _content_parameters(template, messages)
    in_macros = {id(loop) for macro in template.find_all(nodes.Macro) for loop in macro.find_all(nodes.For)}
    for loop in template.find_all(nodes.For):
        reads = any(_reads(loop.iter, name, "content") for name in messages)
        if not reads and isinstance(loop.iter, nodes.Name):
            given = loop.iter.name in parameters.get(id(loop), frozenset())
            reads = given or (loop.iter.name == "content" and id(loop) not in in_macros)
        yield reads and bool(_name(loop.target))


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether an expression is the variable `name` (with `key`: its item or attribute of that name), however filtered,
    tested or sliced."""
    match node:
        case nodes.Filter() | nodes.Test():
            return node.node is not None and _reads(node.node, name, key)
        case nodes.Getitem(arg=nodes.Slice()):
            return _reads(node.node, name, key)
        case nodes.Getitem(arg=nodes.Const(value=value)) if key is not None:
            return value == key and _is_variable(node.node, name)
        case nodes.Getattr() if key is not None:
            return node.attr == key and _is_variable(node.node, name)
        case _:
            return key is None and _is_variable(node, name)


def _name(target: nodes.Node) -> str:
    """The one variable that is assigned to. Raises `_UnfollowedError` for several, or a namespace's."""
    if not isinstance(target, nodes.Name):
        raise _UnfollowedError
    return target.name


def _is_variable(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _aliases(template: nodes.Template, name: str) -> list[str]:
    """The variable and whatever it is assigned to as a whole, or in part by a slice."""
    found = [name]
    for alias in found:  # grows while it is read
        for assignment in template.find_all(nodes.Assign):
            if _reads(assignment.node, alias) and (target := _name(assignment.target)) not in found:
                found.append(target)
    return found


def _message_names(template: nodes.Template) -> list[str]:
    """The variables of loops over the messages."""
    lists = _aliases(template, "messages")
    return [
        _name(loop.target) for loop in template.find_all(nodes.For) if any(_reads(loop.iter, name) for name in lists)
    ]


def _content_parameters(template: nodes.Template, messages: list[str]) -> dict[int, frozenset[str]]:
    """Of each loop within a macro: the macro's parameters that are given a message's content somewhere."""
    found = {}
    for macro in template.find_all(nodes.Macro):
        names = frozenset(_given_content(template, macro, messages))
        if names:
            found.update({id(loop): names for loop in macro.find_all(nodes.For)})
    return found


def _given_content(template: nodes.Template, macro: nodes.Macro, messages: list[str]) -> Iterator[str]:
    parameters = [parameter.name for parameter in macro.args]
    for call in template.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        given = [*zip(parameters, call.args, strict=False), *((named.key, named.value) for named in call.kwargs)]
        for parameter, value in given:
            if parameter in parameters and any(_reads(value, name, "content") for name in messages):
                yield parameter
