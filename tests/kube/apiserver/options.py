"""What a client asks of a list or watch (`ListOptions`), read and refused as Kubernetes 1.36 does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.kube.apiserver.errors import ApiError, Cause, bad_request, invalid
from tests.kube.apiserver.validation import unsupported

_MATCH = "resourceVersionMatch"


def flag(query: Mapping[str, str], name: str) -> bool:
    """A boolean of a query: false is what is absent, `0` or `false`."""
    return name in query and query[name] != "0" and query[name].lower() != "false"


def number(query: Mapping[str, str], name: str) -> int:
    """An integer of a query; 0 where it is absent. Raises `ApiError` 400."""
    text = query.get(name) or "0"
    if not text.removeprefix("-").isdigit():
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


def version(query: Mapping[str, str]) -> int:
    """The resourceVersion of a query; 0 where it is absent. Raises `ApiError` 500, as the real server does."""
    text = query.get("resourceVersion") or "0"
    if not text.isdigit():
        why = f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
        raise ApiError(500, why, reason=None)
    return int(text)


def too_large(asked: int, current: int) -> ApiError:
    """504 for a version from the future, for which the real server waits three seconds."""
    return ApiError(504, f"Timeout: Too large resource version: {asked}, current: {current}", "Timeout", {
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    })  # fmt: skip


@dataclass(frozen=True)
class ListOptions:
    """Of a list: how new it must be, or of which version `exact`ly."""

    version: int
    exact: bool
    limit: int


@dataclass(frozen=True)
class WatchOptions:
    """Of a watch. `since` is None where it begins with what there is; `initial` says so in the stream."""

    since: int | None
    initial: bool
    bookmarks: bool
    seconds: int


def of_list(query: Mapping[str, str]) -> ListOptions:
    """Raises `ApiError`."""
    limit = number(query, "limit")
    _refuse(_list_faults(query))
    try:
        asked = version(query)
    except ApiError as error:
        raise bad_request(f"invalid resource version: {error.message}") from None
    return ListOptions(asked, query.get(_MATCH) == "Exact", limit)


def of_watch(query: Mapping[str, str]) -> WatchOptions:
    """Raises `ApiError`."""
    seconds = number(query, "timeoutSeconds")
    _refuse(_watch_faults(query))
    initial = flag(query, "sendInitialEvents")
    since = None if initial else version(query) or None
    return WatchOptions(since, initial, flag(query, "allowWatchBookmarks"), seconds)


def _list_faults(query: Mapping[str, str]) -> Iterator[Cause]:
    if match := query.get(_MATCH):
        if not query.get("resourceVersion"):
            yield _forbidden(_MATCH, f"{_MATCH} is forbidden unless resourceVersion is provided")
        if query.get("continue"):
            yield _forbidden(_MATCH, f"{_MATCH} is forbidden when continue is provided")
        if match not in ("Exact", "NotOlderThan"):
            yield unsupported(_MATCH, match, ["Exact", "NotOlderThan", ""])
        if match == "Exact" and query.get("resourceVersion") == "0":
            yield _forbidden(_MATCH, f'{_MATCH} "exact" is forbidden for resourceVersion "0"')
    if "sendInitialEvents" in query:
        yield _forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list")


def _watch_faults(query: Mapping[str, str]) -> Iterator[Cause]:
    match, initial = query.get(_MATCH), "sendInitialEvents" in query
    if initial and match != "NotOlderThan":
        yield _forbidden(_MATCH, f"sendInitialEvents requires setting {_MATCH} to NotOlderThan")
    if match:
        if not initial:
            yield _forbidden(_MATCH, f"{_MATCH} is forbidden for watch unless sendInitialEvents is provided")
        if match != "NotOlderThan":
            yield unsupported(_MATCH, match, ["NotOlderThan"])
        if query.get("continue"):
            yield _forbidden(_MATCH, f"{_MATCH} is forbidden when continue is provided")


def _forbidden(field: str, why: str) -> Cause:
    return Cause(field, f"Forbidden: {why}", "FieldValueForbidden")


def _refuse(causes: Iterator[Cause]) -> None:
    if found := list(causes):
        raise invalid("meta.k8s.io", "ListOptions", "", found)
