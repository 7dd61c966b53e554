"""Validation of objects against their schemas, with the messages of the real server."""

from __future__ import annotations

import base64
import binascii
import datetime
import ipaddress
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson

from tests.kube.apiserver.errors import Cause
from tests.kube.apiserver.schema import ANYTHING, Node, child
from tests.kube.apiserver.structural import parse_quantity

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
        if "format" in facets and not well_formed(facets["format"], value):
            yield invalid(path, value, f"{where} in body must be of type {facets['format']}: {shown(value)}")
    elif kind == "array":
        if len(value) < facets.get("minItems", 0):
            yield invalid(path, len(value), f"{where} in body should have at least {facets['minItems']} items")
        if "maxItems" in facets and len(value) > facets["maxItems"]:
            yield Cause(path, f"Too many: {len(value)}: must have at most {facets['maxItems']} items", TOO_MANY)
        if facets.get("uniqueItems") and len({orjson.dumps(v) for v in value}) < len(value):
            yield invalid(path, value, f"{where} in body shouldn't contain duplicates")
    elif kind == "object":
        if len(value) < facets.get("minProperties", 0):
            yield invalid(
                path, len(value), f"{where} in body should have at least {facets['minProperties']} properties"
            )
        if "maxProperties" in facets and len(value) > facets["maxProperties"]:
            yield Cause(path, f"Too many: {len(value)}: must have at most {facets['maxProperties']} items", TOO_MANY)
    yield from _combined(value, facets, path)


def _number(value: float, facets: dict[str, Any], path: str) -> Iterator[Cause]:
    where = _where(path)
    if "minimum" in facets:
        least, open_end = facets["minimum"], facets.get("exclusiveMinimum") is True
        if value < least or (open_end and value == least):
            words = "greater than" if open_end else "greater than or equal to"
            yield invalid(path, value, f"{where} in body should be {words} {least}")
    if "maximum" in facets:
        most, open_end = facets["maximum"], facets.get("exclusiveMaximum") is True
        if value > most or (open_end and value == most):
            words = "less than" if open_end else "less than or equal to"
            yield invalid(path, value, f"{where} in body should be {words} {most}")
    if "multipleOf" in facets and value % facets["multipleOf"]:
        yield invalid(path, value, f"{where} in body should be a multiple of {facets['multipleOf']}")
    limits = {"int32": 31, "int64": 63}.get(facets.get("format", ""))
    if limits and not -(2**limits) <= value < 2**limits:
        yield invalid(path, value, f"{where} in body must be of type {facets['format']}: {shown(value)}")


def _combined(value: Any, facets: dict[str, Any], path: str) -> Iterator[Cause]:
    where = _where(path)
    for part in facets.get("allOf", ()):
        yield from _value_validation(value, part, path)
    if "anyOf" in facets and all(any(_value_validation(value, part, path)) for part in facets["anyOf"]):
        yield invalid(path, value, f"{where} in body must validate at least one schema (anyOf)")
    if "oneOf" in facets and sum(not any(_value_validation(value, part, path)) for part in facets["oneOf"]) != 1:
        yield invalid(path, value, f"{where} in body must validate one and only one schema (oneOf)")
    if "not" in facets and not any(_value_validation(value, facets["not"], path)):
        yield invalid(path, value, f"{where} in body must not validate the schema (not)")


def _value_validation(value: Any, raw: dict[str, Any], path: str) -> Iterator[Cause]:
    """Validate against a schema inside a combinator, where only values are judged."""
    if "type" in raw and type_of(value) != raw["type"] and (raw["type"], type_of(value)) != ("number", "integer"):
        yield Cause(path, f"must be of type {raw['type']}", TYPE)
        return
    yield from _facets(value, raw, path)
    if isinstance(value, dict):
        for name in raw.get("required", ()):
            if name not in value:
                yield required(f"{path}.{name}" if path else name)
        for name, part in raw.get("properties", {}).items():
            if name in value:
                yield from _value_validation(value[name], part, f"{path}.{name}")
    elif isinstance(value, list) and isinstance(raw.get("items"), dict):
        for number, item in enumerate(value):
            yield from _value_validation(item, raw["items"], f"{path}[{number}]")


_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h|d|w))+$")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}$")
_HOST = re.compile(
    r"(?=.{1,253}$)[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*$"
)


def well_formed(name: str, text: str) -> bool:
    """Whether a string has the named format; formats the server does not know are ignored."""
    try:
        match name:
            case "date-time":
                datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
                return "T" in text
            case "date":
                datetime.date.fromisoformat(text)
            case "duration":
                return bool(_DURATION.match(text))
            case "ipv4":
                ipaddress.IPv4Address(text)
            case "ipv6":
                ipaddress.IPv6Address(text)
            case "cidr":
                ipaddress.ip_network(text, strict=False)
            case "uuid" | "uuid3" | "uuid4" | "uuid5":
                return bool(_UUID.match(text))
            case "hostname":
                return bool(_HOST.match(text))
            case "email":
                return "@" in text
            case "uri":
                return ":" in text or text.startswith("/")
            case "byte":
                base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return False
    return True
