"""Reads a manifest, and refuses a bad one in words that a person can act on.

Every problem names the line, the field's path, the value and what is allowed; all problems of a manifest are
reported together.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from controller.api.model import API_VERSION, KIND, KVCluster
from controller.api.problems import Location, ManifestError, ManifestProblem, describe, dotted, show

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
"""What an API server adds to metadata. It is accepted, so that the output of `kubectl get -o yaml` is a manifest."""


def load_manifest(file: str | Path) -> KVCluster:
    """The manifest in this file (`-`: standard input). Raises `ManifestError`."""
    source = "standard input" if str(file) == "-" else str(file)
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if str(file) == "-" else _read(Path(file))
    except OSError as error:
        raise ManifestError(source, [ManifestProblem("", f"cannot be read: {error.strerror or error}")]) from None
    return parse_manifest(data, source)


def _read(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def parse_manifest(data: bytes, source: str = "manifest") -> KVCluster:
    """The manifest in this YAML or JSON text. Raises `ManifestError`."""
    if len(data) > MAX_BYTES:
        raise ManifestError(source, [ManifestProblem("", f"is larger than {MAX_BYTES:,} bytes")])
    root = _compose(data, source)
    lines: dict[Location, int] = {}
    problems = list(_survey(root, lines))
    if problems:
        raise ManifestError(source, problems)
    content = _construct(root, source)
    if type(content) is not dict:
        raise ManifestError(
            source,
            [ManifestProblem("", f"must be a mapping with apiVersion, kind, metadata and spec, not {show(content)}")],
        )
    return validate_manifest(content, source, lines)


def validate_manifest(
    content: Mapping[str, Any], source: str = "manifest", lines: Mapping[Location, int] | None = None
) -> KVCluster:
    """The manifest with this content. `lines` says where each value stands, if known. Raises `ManifestError`."""
    lines = lines or {}
    # A document of another kind has a hundred unknown fields. Only its kind is worth reporting.
    wrong_kind = [
        ManifestProblem(name, f"must be {expected}, not {show(content.get(name))}", lines.get((name,)))
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
        found += _behind_unknown_fields(content, found)
        raise ManifestError(source, [describe(details, content, lines) for details in found]) from None


def _behind_unknown_fields(content: Mapping[str, Any], found: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Rules across fields that are broken too: pydantic does not check them on a model with an unknown field."""
    unknown = [details["loc"] for details in found if details["type"] == "extra_forbidden"]
    if not unknown:
        return []
    known = copy.deepcopy(dict(content))
    for *place, name in unknown:
        part: Any = known
        for step in place:
            part = part[step]
        del part[name]
    try:
        KVCluster.model_validate(known)
    except ValidationError as error:
        named = {(details["type"], details["loc"]) for details in found}
        return [each for each in error.errors(include_url=False) if (each["type"], each["loc"]) not in named]
    return []


def override(manifest: KVCluster, changes: Mapping[tuple[str, ...], object], source: str) -> KVCluster:
    """The manifest with other values at these paths. Raises `ManifestError`, which speaks of `source`."""
    content = manifest.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for location, value in changes.items():
        part = content
        for name in location[:-1]:
            part = part.setdefault(name, {})
        part[location[-1]] = value
    return validate_manifest(content, source)


# --- YAML -----------------------------------------------------------------------------------------------


def _compose(data: bytes, source: str) -> yaml.Node:
    try:
        text = data.decode("utf-8-sig")
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if not _is_null(node)]
    except UnicodeDecodeError as error:
        raise ManifestError(
            source, [ManifestProblem("", f"is not UTF-8 text: {error.reason} at byte {error.start}")]
        ) from None
    except yaml.YAMLError as error:
        raise ManifestError(source, [_not_yaml(error)]) from None
    except RecursionError:
        raise ManifestError(source, [ManifestProblem("", "is nested too deeply")]) from None
    if not documents:
        raise ManifestError(source, [ManifestProblem("", "is empty")])
    if len(documents) > 1:
        line = documents[1].start_mark.line + 1
        message = f"holds {len(documents)} documents: put each {KIND} into a file of its own"
        raise ManifestError(source, [ManifestProblem("", message, line)])
    return documents[0]


def _not_yaml(error: Exception) -> ManifestProblem:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = " ".join(part for part in (error.context, error.problem) if part)
        return ManifestProblem("", f"is not YAML: {what}", error.problem_mark.line + 1)
    return ManifestProblem("", f"is not YAML: {' '.join(str(error).split())}")


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _construct(root: yaml.Node, source: str) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(root)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a scalar that looks like a date but is none (2024-13-45).
        raise ManifestError(source, [_not_yaml(error)]) from None
    finally:
        loader.dispose()


def _survey(root: yaml.Node, lines: dict[Location, int]) -> Iterator[ManifestProblem]:
    """Records the line of every value in `lines`; yields keys that are given twice, and endless or huge documents."""
    pending: list[tuple[yaml.Node, Location, frozenset[int]]] = [(root, (), frozenset())]
    seen = 0
    while pending:
        node, location, ancestors = pending.pop()
        seen += 1
        if seen > MAX_NODES:
            yield ManifestProblem("", f"stands for more than {MAX_NODES:,} values")
            return
        if id(node) in ancestors:
            yield ManifestProblem(dotted(location), "contains itself through an alias", node.start_mark.line + 1)
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
                    yield ManifestProblem(dotted((*location, name)), message, line)
                first.setdefault(name, line)
                lines.setdefault((*location, name), line)
                pending.append((value, (*location, name), inside))
