"""Requests, taken apart the way the API server's filters do it: who asks, for what, with which options.

Modelled: bearer tokens (a user's name behind `fake-`), impersonation by the administrator, the verb of a request, the
options of watches. Checked against the real server by `test_conformance_access.py` and `test_conformance_watch.py`.

Not modelled, and refused with 501: bodies in YAML, initial events of watches other than those after a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from starlette.requests import Request

from tests.kube.apiserver import protobuf
from tests.kube.apiserver.cluster import ADMIN, Ask, User
from tests.kube.apiserver.errors import ApiError, bad_request, not_modelled
from tests.kube.apiserver.rbac import Attributes
from tests.kube.apiserver.selectors import field_terms

LARGEST_BODY = 3 * 1024 * 1024

TOKEN = "fake-"
MATCH = "resourceVersionMatch"


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
        return self.query.get("watch") in ("true", "1")

    @property
    def verb(self) -> str:
        if not self.resource:
            return self.method.lower()
        match self.method:
            case "GET":
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
        """The body, which is JSON (YAML is not modelled) or protobuf. Raises `ApiError`."""
        if not self.raw:
            return None
        if self.headers.get("content-type") == "application/vnd.kubernetes.protobuf":
            return protobuf.decode(self.raw)
        if len(self.raw) > LARGEST_BODY:
            raise ApiError(413, f"Request entity too large: limit is {LARGEST_BODY}", "RequestEntityTooLarge")
        try:
            return orjson.loads(self.raw)
        except orjson.JSONDecodeError as error:
            if "yaml" in self.headers.get("content-type", ""):
                raise not_modelled("bodies in YAML") from None
            raise bad_request(f"couldn't get version/kind; json parse error: {error}") from None

    def ask(self) -> Ask:
        """How this request writes."""
        manager = self.query.get("fieldManager") or self.headers.get("user-agent", "unknown").partition("/")[0]
        validation = self.query.get("fieldValidation") or "Warn"
        dry_run = self.query.get("dryRun") == "All"
        return Ask(self.user, manager[:128], self.subresource, dry_run, validation, self.warnings)


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
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] != "status":
        call.namespace, rest = rest[1], rest[2:]
    call.resource = rest[0]
    call.name = rest[1] if len(rest) > 1 else ""
    call.subresource = rest[2] if len(rest) > 2 else ""
    call.tail = "/".join(rest[3:])
    if call.resource == "namespaces" and not call.group:
        call.namespace = call.name
    return call


def user_named(name: str) -> User:
    return ADMIN if name == ADMIN.name else User(name)


def token_of(name: str) -> str:
    """The bearer token of a user."""
    return TOKEN + name


def authenticate(headers: Any) -> User:
    """Who asks: without a token the administrator, for kubectl sends none over plain HTTP. Raises `ApiError` 401."""
    scheme, _, token = headers.get("authorization", f"Bearer {TOKEN}{ADMIN.name}").partition(" ")
    if scheme.lower() != "bearer" or not token.startswith(TOKEN):
        raise ApiError(401, "Unauthorized")
    user = user_named(token.removeprefix(TOKEN))
    other = headers.get("impersonate-user")
    if other is None:
        return user
    if not user.admin:
        raise not_modelled("impersonation by others than the administrator")
    return user_named(other)


def number(query: Mapping[str, str], name: str) -> int:
    """An integer of a query; 0 where it is absent. Raises `ApiError` 400."""
    text = query.get(name) or "0"
    if not text.isdigit():
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


@dataclass(frozen=True)
class WatchOptions:
    """Of a watch. `since` is None where it begins with what there is; `initial` says so in the stream."""

    since: int | None
    initial: bool
    bookmarks: bool
    seconds: int


def of_watch(query: Mapping[str, str]) -> WatchOptions:
    """Raises `ApiError`."""
    initial = "sendInitialEvents" in query
    if (query.get("sendInitialEvents"), query.get(MATCH)) not in ((None, None), ("true", "NotOlderThan")):
        raise not_modelled("watches with other initial events than those after a version")
    since = None if initial else number(query, "resourceVersion") or None
    bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
    return WatchOptions(since, initial, bookmarks, number(query, "timeoutSeconds"))
