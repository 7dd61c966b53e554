"""Validation of objects against their schemas, with the messages of the real server.

Checked against the real server by `test_conformance.py`. Not modelled: the keywords of JSON schema that
`customresources.py` refuses, and formats other than date-time, int32 and int64.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson
from kubernetes.utils.quantity import parse_quantity

from tests.kube.apiserver.errors import ApiError, Cause
from tests.kube.apiserver.fieldsets import item_element
from tests.kube.apiserver.schema import ANYTHING, Node, child

REQUIRED = "FieldValueRequired"
TYPE = "FieldValueTypeInvalid"
UNSUPPORTED = "FieldValueNotSupported"
TOO_MANY = "FieldValueTooMany"
TOO_LONG = "FieldValueTooLong"
DUPLICATE = "FieldValueDuplicate"

BLOCKING = {REQUIRED, TYPE, TOO_MANY, TOO_LONG}
"""Faults after which CEL rules are not evaluated."""
UNCHECKED = Cause(
    "<nil>",
    'Invalid value: "null": some validation rules were not checked because the object was invalid; correct the '
    "existing errors to complete validation",
)


def shown(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, str):
        return orjson.dumps(value).decode()
    if isinstance(value, dict | list):
        return orjson.dumps(value).decode()
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if not isinstance(value, float | int) \
        or isinstance(value, bool) else str(value)  # fmt: skip


def invalid(path: str, value: Any, why: str) -> Cause:
    return Cause(path, f"Invalid value: {shown(value)}: {why}")


def required(path: str, why: str = "") -> Cause:
    return Cause(path, f"Required value{': ' + why if why else ''}", REQUIRED)


def unsupported(path: str, value: Any, allowed: list[Any]) -> Cause:
    listed = ", ".join(shown(a) for a in allowed)
    return Cause(path, f"Unsupported value: {shown(value)}: supported values: {listed}", UNSUPPORTED)


def type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


@lru_cache(maxsize=512)
def pattern(text: str) -> re.Pattern[str]:
    """A Go pattern, compiled."""
    return re.compile(text.replace("\\z", "\\Z"))


def validate(value: Any, node: Node, path: str = "") -> Iterator[Cause]:
    """Every fault of a value."""
    if value is None:
        if not node.nullable and (node.type or node.int_or_string):
            yield Cause(
                path, f'Invalid value: "null": {_where(path)} in body must be of type {node.type}: "null"', TYPE
            )
        return
    if node.preserve and not node.type and not node.properties and node.additional is None and not node.facets:
        return
    kind = type_of(value)
    if node.int_or_string:
        if node.quantity:
            try:
                parse_quantity(str(value))
            except ValueError:
                yield invalid(path, value, "quantities must match the regular expression "
                              "'^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")  # fmt: skip
            return
        if kind not in ("integer", "string"):
            yield _wrong_type(path, kind, "integer,string")
            return
    elif node.type and not _fits(value, kind, node.type):
        yield _wrong_type(path, kind, node.type)
        return
    if node.facets:
        yield from _facets(value, node.facets, path)
    if kind == "object":
        for name in node.required:
            if name not in value:
                yield required(f"{path}.{name}" if path else name)
        for name, below in value.items():
            known = child(node, name)
            if known is not None and known is not ANYTHING:
                where = _inside(path, name, name in node.properties)
                yield from validate(below, known, where)
    elif kind == "array" and node.items is not None:
        for number, item in enumerate(value):
            yield from validate(item, node.items, f"{path}[{number}]")
        if node.list_type != "atomic":
            yield from _duplicates(value, node, path)


def _fits(value: Any, kind: str, wanted: str) -> bool:
    """Whether a value may stand where a type is wanted: 1 is a number, and 1.0 an integer."""
    return kind == wanted or (wanted == "number" and kind == "integer") or (
        wanted == "integer" and kind == "number" and float(value).is_integer()
    )  # fmt: skip


def _wrong_type(path: str, kind: str, wanted: str) -> Cause:
    return Cause(path, f'Invalid value: "{kind}": {_where(path)} in body must be of type {wanted}: "{kind}"', TYPE)


def _where(path: str) -> str:
    return path or "<root>"


def _inside(path: str, name: str, declared: bool) -> str:
    if not declared and not name.replace("_", "").replace("-", "").isalnum():
        return f"{path}[{name}]"
    return f"{path}.{name}" if path else name


def _duplicates(items: list[Any], node: Node, path: str) -> Iterator[Cause]:
    seen = set()
    for number, item in enumerate(items):
        if node.list_type == "map" and isinstance(item, dict):
            key: Any = {k: item.get(k, node.key_defaults.get(k)) for k in node.list_keys}
        else:
            key = item
        mark = orjson.dumps(key, option=orjson.OPT_SORT_KEYS)
        if mark in seen:
            yield Cause(f"{path}[{number}]", f"Duplicate value: {shown(key)}", DUPLICATE)
        seen.add(mark)


def _facets(value: Any, facets: dict[str, Any], path: str) -> Iterator[Cause]:
    where = _where(path)
    kind = type_of(value)
    if "enum" in facets and value not in facets["enum"]:
        yield unsupported(path, value, facets["enum"])
    if kind in ("integer", "number"):
        yield from _number(value, facets, path)
    elif kind == "string":
        if len(value) < facets.get("minLength", 0):
            yield invalid(path, value, f"{where} in body should be at least {facets['minLength']} chars long")
        if "maxLength" in facets and len(value) > facets["maxLength"]:
            yield Cause(path, f"Too long: may not be more than {facets['maxLength']} bytes", TOO_LONG)
        if "pattern" in facets and not pattern(facets["pattern"]).search(value):
            yield invalid(path, value, f"{where} in body should match '{facets['pattern']}'")
        if "format" in facets and not _well_formed(facets["format"], value):
            yield invalid(path, value, f"{where} in body must be of type {facets['format']}: {shown(value)}")
    elif kind == "array":
        if len(value) < facets.get("minItems", 0):
            yield invalid(path, len(value), f"{where} in body should have at least {facets['minItems']} items")
        if "maxItems" in facets and len(value) > facets["maxItems"]:
            yield Cause(path, f"Too many: {len(value)}: must have at most {facets['maxItems']} items", TOO_MANY)


def _number(value: float, facets: dict[str, Any], path: str) -> Iterator[Cause]:
    where = _where(path)
    if "minimum" in facets:
        least, open_end = facets["minimum"], facets.get("exclusiveMinimum") is True
        if value < least or (open_end and value == least):
            words = "greater than" if open_end else "greater than or equal to"
            yield invalid(path, value, f"{where} in body should be {words} {least}")
    if "maximum" in facets and value > facets["maximum"]:
        yield invalid(path, value, f"{where} in body should be less than or equal to {facets['maximum']}")
    limits = {"int32": 31, "int64": 63}.get(facets.get("format", ""))
    if limits and not -(2**limits) <= value < 2**limits:
        yield invalid(path, value, f"{where} in body must be of type {facets['format']}: {shown(value)}")


def _well_formed(name: str, text: str) -> bool:
    """Whether a string has the named format."""
    if name != "date-time":
        return True  # those of built-in kinds that are not written here
    try:
        datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return False
    return "T" in text


def check_typed(obj: dict[str, Any], node: Node) -> None:
    """What server-side apply makes of a manifest that does not fit its kind's schema, after structured-merge-diff.

    Raises `ApiError` 500, as Kubernetes does, with every fault in the order of the server's walk: fields that are not
    declared, items given twice, strings where numbers, lists or maps belong. The rest is left to what comes after.
    """
    faults = list(_faults(obj, node, ""))
    if not faults:
        return
    meta = obj.get("metadata") or {}
    subject = f"{meta.get('namespace', '')}/{meta.get('name', '')}; {obj['apiVersion']}, Kind={obj['kind']}"
    what = faults[0] if len(faults) == 1 else "errors:" + "".join(f"\n  {fault}" for fault in faults)
    raise ApiError(500, f"failed to create typed patch object ({subject}): {what}", reason=None)


def _faults(value: Any, node: Node, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name in sorted(value):
            where = f"{path}.{name}"
            known = child(node, name)
            if known is None and not node.preserve:
                yield f"{where}: field not declared in schema"
            elif known is not None:
                yield from _faults(value[name], known, where)
    elif isinstance(value, list) and node.items is not None:
        seen: set[str] = set()
        for number, item in enumerate(value):
            where = f"{path}[{_key(item, node) or number}]"
            if node.list_type in ("map", "set") and (element := item_element(item, node)) in seen:
                yield f"{path}: duplicate entries for key [{_key(item, node) or orjson.dumps(item).decode()}]"
            elif node.list_type in ("map", "set"):
                seen.add(element)
            yield from _faults(item, node.items, where)
    elif isinstance(value, str) and not node.int_or_string and not node.quantity:
        if node.type in ("integer", "number"):
            yield f"{path}: expected numeric (int or float), got string"
        elif node.type in ("array", "object"):
            yield f"{path}: expected {'list' if node.type == 'array' else 'map'}, got &{{{value}}}"


def _key(item: Any, node: Node) -> str:
    """`name="c"`; empty for items that have no keys."""
    if node.list_type != "map" or not isinstance(item, dict):
        return ""
    given = {key: item.get(key, node.key_defaults.get(key)) for key in node.list_keys}
    return ",".join(f"{key}={orjson.dumps(value).decode()}" for key, value in given.items() if value is not None)
