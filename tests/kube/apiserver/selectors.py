"""Label and field selectors.

Checked against the real server by `test_conformance_objects.py`. Fields that nobody here selects by are refused, with
the answer that a real server gives for fields that cannot be selected by.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.kube.apiserver.errors import bad_request

Object = dict[str, Any]
Predicate = Callable[[Object], bool]

_SET = re.compile(r"^\s*(?P<key>[^\s!=()]+)\s+(?P<op>in|notin)\s*\((?P<values>[^)]*)\)\s*$")
_EQUAL = re.compile(r"^\s*(?P<key>[^\s!=(),]+)\s*(?P<op>==|=|!=)\s*(?P<value>[^\s!=(),]*)\s*$")
_EXISTS = re.compile(r"^\s*(?P<not>!?)\s*(?P<key>[^\s!=(),]+)\s*$")


def _parts(text: str) -> list[str]:
    """A selector's requirements: commas inside parentheses do not part them."""
    return [part for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _label_requirement(part: str) -> Callable[[dict[str, str]], bool]:
    if match := _SET.match(part):
        key, values = match["key"], {v.strip() for v in match["values"].split(",")}
        if match["op"] == "in":
            return lambda labels: key in labels and labels[key] in values
        return lambda labels: key not in labels or labels[key] not in values
    if match := _EQUAL.match(part):
        key, value = match["key"], match["value"]
        if match["op"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := _EXISTS.match(part):
        key, wanted = match["key"], not match["not"]
        return lambda labels: (key in labels) is wanted
    raise bad_request(f"unable to parse requirement: {part!r}")


def labels_match(text: str) -> Predicate:
    """Whether an object's labels satisfy a selector. Raises `ApiError` 400."""
    requirements = [_label_requirement(part) for part in _parts(text)]

    def matches(obj: Object) -> bool:
        labels = obj["metadata"].get("labels") or {}
        return all(requirement(labels) for requirement in requirements)

    return matches


def selector_matches(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Whether labels satisfy a `LabelSelector` object; an absent one selects nothing, an empty one everything."""
    if selector is None:
        return False
    if any(labels.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    for term in selector.get("matchExpressions") or ():
        key, values = term["key"], term.get("values") or ()
        fits = {
            "In": labels.get(key) in values and key in labels,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[term["operator"]]
        if not fits:
            return False
    return True


# The fields that objects are selected by here, besides metadata.name and metadata.namespace.
_FIELDS: dict[str, frozenset[str]] = {
    "pods": frozenset({"spec.nodeName", "status.phase"}),
    "events": frozenset({
        "involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid", "type",
    }),
}  # fmt: skip


def field_value(obj: Object, path: str) -> str:
    value: Any = obj
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return "" if value is None else str(value)


def field_terms(text: str) -> list[tuple[str, str, bool]]:
    """The (path, value, equal) of each requirement. Raises `ApiError` 400."""
    terms = []
    for part in _parts(text):
        match = _EQUAL.match(part)
        if match is None:
            raise bad_request(f"invalid field selector: {text!r}")
        terms.append((match["key"], match["value"], match["op"] != "!="))
    return terms


def fields_match(text: str, plural: str) -> Predicate:
    """Whether an object's fields satisfy a selector. Raises `ApiError` 400 for a field that cannot be selected by."""
    terms = field_terms(text)
    known = {"metadata.name", "metadata.namespace"} | _FIELDS.get(plural, frozenset())
    for path, _, _ in terms:
        if path not in known:
            raise bad_request(f"field label not supported: {path}")
    return lambda obj: all((field_value(obj, path) == value) is equal for path, value, equal in terms)
