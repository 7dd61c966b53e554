"""Reading a manifest, and refusing a bad one in words a person can act on.

Every problem names the line, the field's path, the value and what is allowed; all problems of a manifest are
reported together.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from controller.spec.fields import names_under
from controller.spec.model import API_VERSION, KIND, KVCluster

MAX_BYTES = 1_048_576
"""An API server takes no larger object either (etcd's limit)."""
MAX_NODES = 100_000
"""Values after aliases are followed: a few lines of nested aliases can stand for billions."""

_SERVER_METADATA = frozenset(
    {
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generation",
        "managedFields",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)
"""What an API server adds to metadata: `kubectl get -o yaml` can be run as it is."""

Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a manifest. `path` is empty when it is not about one field."""

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class ManifestError(ValueError):
    """A manifest is refused. `problems` says why, one entry a problem."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{source} is not a valid {KIND}:", *(f"  {problem}" for problem in problems)]))


def load_manifest(file: str | Path) -> KVCluster:
    """The manifest in this file (`-`: standard input). Raises `ManifestError`."""
    source = "standard input" if str(file) == "-" else str(file)
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if str(file) == "-" else _read(Path(file))
    except OSError as error:
        raise ManifestError(source, [Problem("", f"cannot be read: {error.strerror or error}")]) from None
    return parse_manifest(data, source)


def _read(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def parse_manifest(data: bytes, source: str = "manifest") -> KVCluster:
    """The manifest in this YAML or JSON text. Raises `ManifestError`."""
    if len(data) > MAX_BYTES:
        raise ManifestError(source, [Problem("", f"is larger than {MAX_BYTES:,} bytes")])
    root = _compose(data, source)
    lines: dict[Location, int] = {}
    problems = list(_survey(root, lines))
    if problems:
        raise ManifestError(source, problems)
    content = _construct(root, source)
    if type(content) is not dict:
        raise ManifestError(
            source, [Problem("", f"must be a mapping with apiVersion, kind, metadata and spec, not {_show(content)}")]
        )
    return validate_manifest(content, source, lines)


def validate_manifest(
    content: Mapping[str, Any], source: str = "manifest", lines: Mapping[Location, int] | None = None
) -> KVCluster:
    """The manifest with this content. `lines` says where each value stands, if known. Raises `ManifestError`."""
    lines = lines or {}
    # A document of another kind has a hundred unknown fields; the one problem worth telling is its kind.
    wrong_kind = [
        Problem(
            name,
            f"must be {expected}, not {_show(content[name])}"
            if name in content
            else f"is required: {name}: {expected}",
            lines.get((name,)),
        )
        for name, expected in (("apiVersion", API_VERSION), ("kind", KIND))
        if content.get(name) != expected
    ]
    if wrong_kind:
        raise ManifestError(source, wrong_kind)
    content = {name: value for name, value in content.items() if name != "status"}
    if type(metadata := content.get("metadata")) is dict:
        content["metadata"] = {name: value for name, value in metadata.items() if name not in _SERVER_METADATA}
    try:
        return KVCluster.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise ManifestError(source, [_problem(details, content, lines) for details in found]) from None


# --- YAML -----------------------------------------------------------------------------------------------


def _compose(data: bytes, source: str) -> yaml.Node:
    try:
        text = data.decode("utf-8-sig")
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if not _is_null(node)]
    except UnicodeDecodeError as error:
        raise ManifestError(source, [Problem("", f"is not UTF-8 text: {error.reason} at byte {error.start}")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else None
        raise ManifestError(source, [Problem("", f"is not YAML: {what}", line)]) from None
    except yaml.YAMLError as error:
        raise ManifestError(source, [Problem("", f"is not YAML: {' '.join(str(error).split())}")]) from None
    except RecursionError:
        raise ManifestError(source, [Problem("", "is nested too deeply")]) from None
    if not documents:
        raise ManifestError(source, [Problem("", "is empty")])
    if len(documents) > 1:
        line = documents[1].start_mark.line + 1
        message = f"holds {len(documents)} documents: put each {KIND} into a file of its own"
        raise ManifestError(source, [Problem("", message, line)])
    return documents[0]


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _construct(root: yaml.Node, source: str) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(root)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a scalar that looks like a date but is none (2024-13-45).
        raise ManifestError(source, [Problem("", f"is not YAML: {' '.join(str(error).split())}")]) from None
    finally:
        loader.dispose()


def _survey(root: yaml.Node, lines: dict[Location, int]) -> Iterator[Problem]:
    """Notes the line of every value in `lines`; yields keys given twice, and endless or huge documents."""
    pending: list[tuple[yaml.Node, Location, frozenset[int]]] = [(root, (), frozenset())]
    seen = 0
    while pending:
        node, location, ancestors = pending.pop()
        seen += 1
        if seen > MAX_NODES:
            yield Problem("", f"stands for more than {MAX_NODES:,} values")
            return
        if id(node) in ancestors:
            yield Problem(_path(location), "contains itself through an alias", node.start_mark.line + 1)
            return
        lines.setdefault(location, node.start_mark.line + 1)
        inside = ancestors | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            pending.extend((item, (*location, index), inside) for index, item in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in first and name != "<<":
                    message = f"is given twice (first on line {first[name]}): remove one of the two"
                    yield Problem(_path((*location, name)), message, line)
                first.setdefault(name, line)
                lines.setdefault((*location, name), line)
                pending.append((value, (*location, name), inside))


# --- words ----------------------------------------------------------------------------------------------


def _path(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if type(part) is int else f".{part}" if text else str(part)
    return text


def _show(value: Any) -> str:
    """A value as the manifest has it, cut to a readable length."""
    if type(value) is dict:
        return "a mapping"
    if type(value) is list:
        return "a list"
    if value is None:
        return "null"
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
            return f"must be {context['ge']:,} or more"
        case "greater_than":
            return f"must be more than {context['gt']:,}"
        case "less_than_equal":
            return f"must be {context['le']:,} or less"
        case "string_too_long":
            return f"must have at most {context['max_length']:,} characters"
        case "too_long":
            return f"must have at most {context['max_length']:,} items"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "enum" | "literal_error":
            allowed = _expected(context)
            return f"must be one of {', '.join(allowed)}"
        case "one_of":
            return f"must be one of {', '.join(context['choices'])}"
        case _:
            return _MUST_BE.get(kind, details["msg"])


def _problem(details: ErrorDetails, content: Mapping[str, Any], lines: Mapping[Location, int]) -> Problem:
    location: Location = details["loc"]
    match details["type"]:
        case "extra_forbidden":
            parent = tuple("[]" if type(part) is int else str(part) for part in location[:-1])
            known = names_under(parent)
            message = f"unknown field{_did_you_mean(location[-1], known)} (allowed: {', '.join(known)})"
        case "missing":
            message = "is required"
        case "rule":
            location = (*location, *_location(details["ctx"]["path"]))
            value = _value_at(content, location)
            message = details["msg"] if value is _ABSENT else f"{_show(value)}: {details['msg']}"
        case _:
            message = f"{_requirement(details)}, not {_show(details['input'])}{_suggestion(details)}"
    line = next((lines[location[:end]] for end in range(len(location), 0, -1) if location[:end] in lines), None)
    return Problem(_path(location), message, line)


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
