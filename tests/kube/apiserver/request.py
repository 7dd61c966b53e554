"""Requests, taken apart the way the API server's filters do it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
import yaml
from starlette.requests import Request

from tests.kube.apiserver import protobuf
from tests.kube.apiserver.cluster import ADMIN, MASTERS, Ask, User
from tests.kube.apiserver.errors import ApiError, Cause, bad_request, invalid
from tests.kube.apiserver.rbac import Attributes
from tests.kube.apiserver.selectors import field_terms
from tests.kube.apiserver.validation import unsupported

LARGEST_BODY = 3 * 1024 * 1024


_PREFIX = "fake-"
_MATCH = "resourceVersionMatch"


class Logged(NamedTuple):
    """One request that was answered (a watch: begun). Requests for no resource have their path as name."""

    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    user: str
    status: int


@dataclass
class Call:
    """One request to the API."""

    method: str
    path: str
    query: dict[str, str]
    headers: Any
    raw: bytes
    group: str = ""
    version: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    tail: str = ""
    """What follows the subresource."""
    user: User = ADMIN
    warnings: list[str] = field(default_factory=list)

    @property
    def watching(self) -> bool:
        return flag(self.query, "watch")

    @property
    def verb(self) -> str:
        if not self.resource:
            return self.method.lower()
        match self.method:
            case "GET" | "HEAD":
                if self.watching and not self.subresource:
                    return "watch"
                return "get" if self.name else "list"
            case "POST":
                return "create"
            case "PUT":
                return "update"
            case "PATCH":
                return "patch"
            case "DELETE":
                return "delete" if self.name else "deletecollection"
        return self.method.lower()

    def attributes(self) -> Attributes:
        if not self.resource:
            return Attributes(self.verb, path=self.path)
        name = self.name
        if not name and (selector := self.query.get("fieldSelector")):
            # A list of one object, by its name, is allowed to whoever may read that object.
            name = next((v for path, v, equal in field_terms(selector) if path == "metadata.name" and equal), "")
        return Attributes(self.verb, self.group, self.resource, self.subresource, self.namespace, name)

    def logged(self, status: int) -> Logged:
        name = self.name if self.resource else self.path
        return Logged(
            self.verb, self.group, self.resource, self.subresource, self.namespace, name, self.user.name, status
        )

    @property
    def accept(self) -> str:
        return str(self.headers.get("accept", ""))

    def body(self) -> Any:
        """The body, as JSON or YAML. Raises `ApiError` 400 or 415."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip()
        if kind == "application/cbor":
            raise ApiError(
                415,
                "the body of the request was in an unknown format - accepted media types include: application/json, "
                "application/yaml, application/vnd.kubernetes.protobuf",
            )
        if kind == "application/vnd.kubernetes.protobuf" and self.raw:
            return protobuf.decode(self.raw)
        if not self.raw:
            return None
        if len(self.raw) > LARGEST_BODY:
            raise ApiError(413, f"Request entity too large: limit is {LARGEST_BODY}", "RequestEntityTooLarge")
        try:
            return orjson.loads(self.raw)
        except orjson.JSONDecodeError as error:
            if "yaml" not in kind:
                raise bad_request(f"couldn't get version/kind; json parse error: {error}") from None
        try:
            return yaml.load(self.raw, _Loader)  # noqa: S506  it is the safe one
        except yaml.YAMLError as error:
            raise bad_request(f"error decoding YAML: {error}") from None

    def ask(self) -> Ask:
        """How this request writes."""
        manager = self.query.get("fieldManager") or self.headers.get("user-agent", "unknown").partition("/")[0]
        validation = self.query.get("fieldValidation") or "Warn"
        dry_run = self.query.get("dryRun") == "All"
        return Ask(self.user, manager[:128], self.subresource, dry_run, validation, self.warnings)


class _Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: timestamps are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


async def read(request: Request) -> Call:
    """Take a request apart."""
    path = request.url.path
    call = Call(request.method, path, dict(request.query_params), request.headers, await request.body())
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 2:
        call.version, rest = parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 3:
        (call.group, call.version), rest = parts[1:3], parts[3:]
    else:
        return call
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
        call.namespace, rest = rest[1], rest[2:]
    call.resource = rest[0]
    call.name = rest[1] if len(rest) > 1 else ""
    call.subresource = rest[2] if len(rest) > 2 else ""
    call.tail = "/".join(rest[3:])
    if call.resource == "namespaces" and not call.group:
        call.namespace = call.name
    return call


def user_named(name: str, groups: tuple[str, ...] = ()) -> User:
    """A user with the groups its name implies."""
    if name == "admin":
        return ADMIN
    implied: list[str] = list(groups)
    if name.startswith("system:serviceaccount:"):
        implied += ["system:serviceaccounts", f"system:serviceaccounts:{name.split(':')[2]}"]
    return User(name, tuple(dict.fromkeys([*implied, "system:authenticated"])))


def token_of(name: str) -> str:
    """The bearer token of a user."""
    return _PREFIX + base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def authenticate(headers: Any) -> User:
    """Who asks: without a token the administrator, for kubectl sends none over plain HTTP. Raises `ApiError` 401."""
    given = headers.get("authorization")
    if given is None:
        user = ADMIN
    else:
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or not token.startswith(_PREFIX):
            raise ApiError(401, "Unauthorized")
        body = token.removeprefix(_PREFIX)
        try:
            user = user_named(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)).decode())
        except (binascii.Error, UnicodeDecodeError):
            raise ApiError(401, "Unauthorized") from None
    other = headers.get("impersonate-user")
    if other is not None and other != user.name:
        if MASTERS not in user.groups:
            raise ApiError(403, f'users "{other}" is forbidden: User "{user.name}" cannot impersonate resource "users" '
                           'in API group "" at the cluster scope', "Forbidden")  # fmt: skip
        return user_named(other)
    return user


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
