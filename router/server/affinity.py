"""What a request states besides its prompt about where and when it should go: the session it belongs to, the stored
response it is about, how long its answer will be, who sends it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from router.core.decision import Caller, RouteRequest, StoredResponse
from router.core.sessions import Session, session_of
from router.core.stored_responses import stored_response
from runtime.http.context import Headers

RESPONSES = "/v1/responses"
_SESSION_HEADERS = frozenset({b"x-session-id", b"x-dynamo-session-id"})
"""vLLM 0.32 reads the first; the second is NVIDIA Dynamo's."""
_OUTPUT_TOKENS = b"x-kvcluster-output-tokens"
_TENANT = frozenset({b"x-llm-d-inference-fairness-id", b"x-gateway-inference-fairness-id"})
_OBJECTIVE = frozenset({b"x-llm-d-inference-objective", b"x-gateway-inference-objective"})
"""The names of llm-d and, second, those of the Gateway API Inference Extension, from which it took them over."""
_PRIORITY_HEADER = b"x-priority"
_READ = _SESSION_HEADERS | _OBJECTIVE | {_OUTPUT_TOKENS, _PRIORITY_HEADER}
_PRIORITY = re.compile(rb"-?[0-9]{1,9}")
MAX_NAME = 253
"""Characters of a tenant or an objective; what is longer is cut there."""
NO_PRIORITIES: Mapping[str, int] = MappingProxyType({})


class Callers:
    """How requests say who sends them. `priorities`: those of the objectives that a request may name. `tenant_header`:
    the one header that names a tenant, in lower case; empty: those of llm-d."""

    __slots__ = ("priorities", "read")

    def __init__(self, priorities: Mapping[str, int] = NO_PRIORITIES, tenant_header: str = "") -> None:
        self.priorities = priorities
        self.read = _READ | (frozenset({tenant_header.encode()}) if tenant_header else _TENANT)
        """All headers that are read."""


ANY_CALLERS = Callers()
_HINTS = ("prompt_cache_key", "user")
_EMPTY = re.compile(rb"\s*\}")
_PREVIOUS = re.compile(rb'"previous_response_id"\s*:\s*("[^"\\]{1,256}")')


def affine(route: RouteRequest, path: str, fields: Mapping[str, Any]) -> RouteRequest:
    """The request with what its body says about sessions, stored responses and the length of its answer."""
    if "nvext" in fields and (hint := _output_hint(fields)) is not None:
        route = replace(route, output_hint=hint)
    session = _session(fields, route.model)
    stored = _previous(fields) if path == RESPONSES else None
    stores = path == RESPONSES and "request_id" not in fields and fields.get("store") is not False
    if session is None and stored is None and not stores:
        return route
    if stored is None:
        return replace(route, session=session, stores=stores)
    # Its prompt begins with turns that only the worker knows.
    return replace(
        route, keys=None, prompt_tokens=None, reported=None, unread=None, session=session, stored=stored, stores=stores
    )


def affine_ends(route: RouteRequest, path: str, ends: bytes) -> RouteRequest:
    """The same for a body that is not parsed, by its first and last bytes."""
    if path != RESPONSES:
        return route
    previous = _PREVIOUS.search(ends)
    if previous is None:
        return replace(route, stores=True)
    return replace(route, stored=stored_response(previous[1][1:-1].decode("latin-1")), unread=None, stores=True)


def with_headers(route: RouteRequest, headers: Headers, callers: Callers = ANY_CALLERS) -> RouteRequest:
    """The request with what its headers state: its session and the length of its answer, which are stronger than those
    of its body, and its caller.

    A priority that is no number of at most 9 digits is 0. A stated `x-priority` is stronger than an objective's.
    """
    stated, read = False, callers.read
    tenant, objective, priority = b"", b"", b""
    for name, value in headers:
        if name not in read or not value:
            continue
        if name in _SESSION_HEADERS:
            if not stated:
                stated = True
                route = replace(route, session=session_of("session", value.decode("latin-1"), route.model))
        elif name == _OUTPUT_TOKENS:
            if value.isdigit() and (tokens := int(value[:9])):
                route = replace(route, output_hint=tokens)
        elif name in _OBJECTIVE:
            objective = objective or value
        elif name == _PRIORITY_HEADER:
            priority = priority or value
        else:
            tenant = tenant or value
    if tenant or objective or priority:
        return replace(route, caller=_caller(tenant, objective, priority, callers.priorities))
    return route


def _caller(tenant: bytes, objective: bytes, priority: bytes, priorities: Mapping[str, int]) -> Caller:
    named = objective[:MAX_NAME].decode("latin-1")
    level = int(priority) if _PRIORITY.fullmatch(priority) else priorities.get(named, 0)
    return Caller(tenant[:MAX_NAME].decode("latin-1"), level, named)


def _output_hint(fields: Mapping[str, Any]) -> int | None:
    """Where NVIDIA Dynamo reads the tokens that the client expects of the answer."""
    match fields["nvext"]:
        case {"agent_hints": {"osl": int(tokens)}} if tokens > 0 and tokens is not True:
            return tokens
    return None


def named_response(path: str) -> StoredResponse | None:
    """The response that a path below `RESPONSES` is about; None for other paths."""
    if not path.startswith(RESPONSES + "/"):
        return None
    return stored_response(path[len(RESPONSES) + 1 :].partition("/")[0])


def with_request_id(body: bytes, name: str) -> bytes:
    """The body of `POST /v1/responses` with this id, as its first field: a client's own, which comes later, prevails.
    A body that is no JSON object in UTF-8 stays as it is."""
    opening = body.find(b"{")
    if opening < 0 or body[:opening].strip() or body[opening + 1 : opening + 2] == b"\0":
        return body
    comma = b"" if _EMPTY.match(body, opening + 1) else b","
    return b'%s{"request_id":"%s"%s%s' % (body[:opening], name.encode(), comma, body[opening + 1 :])


def _session(fields: Mapping[str, Any], model: str | None) -> Session | None:
    extra = fields.get("vllm_xargs")
    for name in (fields.get("session_id"), extra.get("session_id") if isinstance(extra, dict) else None):
        if isinstance(name, str) and name:
            return session_of("session", name, model)
    metadata = fields.get("metadata")
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    for kind, name in (*((hint, fields.get(hint)) for hint in _HINTS), ("user", user)):
        if isinstance(name, str) and name:
            return session_of(kind, name, model, hint=True)
    return None


def _previous(fields: Mapping[str, Any]) -> StoredResponse | None:
    name = fields.get("previous_response_id")
    return stored_response(name) if isinstance(name, str) else None
