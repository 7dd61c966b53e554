"""Problems of a manifest: pydantic's errors in words that a person can act on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from controller.api.fields import names_under, paths_ending_in
from controller.api.model import KIND

Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class ManifestProblem:
    """One thing that is wrong with a manifest. `path` is empty when it is not about one field."""

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class ManifestError(ValueError):
    """A manifest is refused, for each of `problems`."""

    def __init__(self, source: str, problems: Sequence[ManifestProblem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{source} is not a valid {KIND}:", *(f"  {problem}" for problem in problems)]))


def dotted(location: Sequence[str | int]) -> str:
    """`spec.engine.args[0]`, as people write it."""
    text = ""
    for part in location:
        text += f"[{part}]" if type(part) is int else f".{part}" if text else str(part)
    return text


def show(value: Any) -> str:
    """A value as the manifest has it, cut to a readable length."""
    if type(value) is dict:
        return "a mapping"
    if type(value) is list:
        return "a list"
    if value is None:
        return "null"
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(name: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name).lower(), [item.lower() for item in known], n=1, cutoff=0.6)
    return next((f"; did you mean {item}?" for item in known if close and item.lower() == close[0]), "")


_MUST_BE: Mapping[str, str] = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a string (put it in quotes)",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_too_short": "must not be empty",
}


def _number(bound: float) -> str:
    return f"{bound:,.15g}"


def _expected(context: Mapping[str, Any]) -> list[str]:
    """The names in pydantic's `'a', 'b' or 'c'`."""
    return [item.strip("'") for item in str(context["expected"]).replace(" or ", ", ").split(", ")]


def _suggestion(details: ErrorDetails) -> str:
    context: Mapping[str, Any] = details.get("ctx", {})
    match details["type"]:
        case "enum" | "literal_error":
            return _did_you_mean(details["input"], _expected(context))
        case "one_of":
            return _did_you_mean(details["input"], context["choices"])
        case _:
            return ""


def _requirement(details: ErrorDetails) -> str:
    """What is allowed at the place of this error."""
    context: Mapping[str, Any] = details.get("ctx", {})
    kind = details["type"]
    match kind:
        case "greater_than_equal":
            return f"must be {_number(context['ge'])} or more"
        case "greater_than":
            return f"must be more than {_number(context['gt'])}"
        case "less_than_equal":
            return f"must be {_number(context['le'])} or less"
        case "string_too_long":
            return f"must have at most {context['max_length']:,} characters"
        case "too_long":
            return f"must have at most {context['max_length']:,} items"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "enum" | "literal_error":
            return f"must be one of {', '.join(_expected(context))}"
        case "one_of":
            return f"must be one of {', '.join(context['choices'])}"
        case _:
            return _MUST_BE.get(kind, details["msg"])


def describe(details: ErrorDetails, content: Mapping[str, Any], lines: Mapping[Location, int]) -> ManifestProblem:
    """An error of pydantic as a problem. `content` is what was validated, `lines` the line of each value."""
    location: Location = details["loc"]
    match details["type"]:
        case "extra_forbidden":
            parent = tuple("[]" if type(part) is int else str(part) for part in location[:-1])
            known, elsewhere = names_under(parent), paths_ending_in(str(location[-1]))
            hint = _did_you_mean(location[-1], known)
            if not hint and elsewhere:
                hint = f"; did you mean {' or '.join(elsewhere)}?"
            message = f"unknown field{hint} (allowed: {', '.join(known)})"
        case _ if location and location[-1] == "[key]":
            location = location[:-1]
            message = f"a key {_requirement(details)}, not {show(details['input'])}"
        case "missing":
            message = "is required"
        case "rule":
            location = (*location, *_location(details["ctx"]["path"]))
            value = _value_at(content, location)
            message = details["msg"] if value is _ABSENT else f"{show(value)}: {details['msg']}"
        case _:
            message = f"{_requirement(details)}, not {show(details['input'])}{_suggestion(details)}"
    line = next((lines[location[:end]] for end in range(len(location), 0, -1) if location[:end] in lines), None)
    return ManifestProblem(dotted(location), message, line)


_ABSENT = object()


def _location(path: str) -> Location:
    """`args[0]` as ("args", 0)."""
    return tuple(int(part) if part.isdigit() else part for part in path.replace("[", ".").replace("]", "").split("."))


def _value_at(content: Any, location: Location) -> Any:
    for part in location:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return _ABSENT
    return content
