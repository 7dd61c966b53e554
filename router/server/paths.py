"""Which of a worker's paths clients may reach, and which requests may safely be sent twice."""

from __future__ import annotations

import unicodedata
from enum import Enum

from router.server.prompts import CHAT, COMPLETIONS

RESOURCES = frozenset(
    {
        "audio", "batches", "chat", "classify", "completions", "embeddings", "files", "images", "messages", "models",
        "moderations", "pooling", "realtime", "rerank", "responses", "score", "systemone", "videos",
    }
)  # fmt: skip
"""First segments under /v1/ that belong to an inference API: OpenAI's, Anthropic's, and what vLLM 0.32 adds.

A list of what is open, not of what is closed: vLLM has management verbs there too (`load_lora_adapter`,
`unload_lora_adapter`), and what the next release or a plugin adds must not be open to every client by oversight.
"""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
"""Idempotent by definition (RFC 9110 9.2.2), of those that workers know."""

COMPUTED = frozenset(
    {
        COMPLETIONS, CHAT, "/v1/chat/completions/batch", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
        "/v1/completions/render", "/v1/chat/completions/render", "/v1/responses/render", "/v1/messages/render",
        "/v1/completions/derender", "/v1/chat/completions/derender", "/v1/embeddings", "/v1/rerank", "/v1/score",
        "/v1/classify", "/v1/pooling", "/v1/moderations", "/v1/systemone", "/v1/audio/transcriptions",
        "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations", "/tokenize", "/detokenize",
    }
)  # fmt: skip
"""POST there computes an answer and changes nothing else: known to be idempotent in spite of its method."""


class Access(Enum):
    """What becomes of a request for a path."""

    PASSED = "passed"
    """It goes to a worker."""
    CLOSED = "closed"
    """Under /v1/, but no part of an inference API: passed on only where it is allowed by name."""
    UNKNOWN = "unknown"
    """Nothing that a client could want of a worker, or a path that two servers might read in two ways."""


def access(path: str, allowed: frozenset[str] = frozenset()) -> Access:
    """Judge a path that has been percent-decoded once, as the worker's own server will do. O(length of the path)."""
    if path in COMPUTED:
        return Access.PASSED
    if not is_plain(path):
        return Access.UNKNOWN
    if path in allowed:
        return Access.PASSED
    if not path.startswith("/v1/") or path == "/v1/":
        return Access.UNKNOWN
    return Access.PASSED if path.split("/", 3)[2] in RESOURCES else Access.CLOSED


def is_plain(path: str) -> bool:
    """Whether every server reads this decoded path in the same way, as the name of what it says.

    Not plain: whatever decoding it again would change (`%2e` that came as `%252e`), what is no UTF-8, control
    characters, `.` and `..` however they are written (backslashes, `..;x`, compatibility forms of the dot), and empty
    segments: a server further on may resolve any of these to a path that is not for clients.
    """
    if not path.startswith("/") or "%" in path or "\ufffd" in path or not path.isprintable():
        return False
    plain = path if path.isascii() else unicodedata.normalize("NFKC", path)
    if "\\" in plain:
        return False
    *segments, last = plain.split("/")[1:]
    return all(_names(segment) for segment in segments) and (not last or _names(last))


def _names(segment: str) -> bool:
    return segment.partition(";")[0].strip() not in ("", ".", "..")


def repeatable(method: str, path: str) -> bool:
    """Whether sending the request twice has no other effect than sending it once (RFC 9110 9.2.2)."""
    return method in SAFE_METHODS or (method == "POST" and path in COMPUTED)
