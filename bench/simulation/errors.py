"""What a client gets instead of an answer, in the words that a live run records."""

from __future__ import annotations

from typing import NamedTuple

from bench.record import ErrorCause


class Failure(NamedTuple):
    """`Record.error` and `Record.detail` of a request."""

    cause: ErrorCause
    detail: str


PROMPT_TOO_LONG = Failure(ErrorCause.PROMPT_TOO_LONG, "HTTP 400 BadRequestError")
NO_ROOM = Failure(ErrorCause.INVALID, "HTTP 400 BadRequestError")
"""A prompt that leaves no room for a token. A router gives a refusal in the first event of a stream as an answer."""
NO_WORKER = Failure(ErrorCause.UNAVAILABLE, "HTTP 503 ServiceUnavailableError")
SHED = Failure(ErrorCause.UNAVAILABLE, "HTTP 429 rate_limit_error")
"""What flow control answers."""
STREAM_BROKEN = Failure(ErrorCause.BROKEN_STREAM, "error event: InternalServerError")
"""What a router writes at the end of a stream whose worker failed."""
ROUTER_LOST = Failure(ErrorCause.CONNECTION, "ServerDisconnectedError")
"""What a client finds when a router's process ends before its answer began."""
STREAM_LOST = Failure(ErrorCause.CONNECTION, "ClientPayloadError")
"""What it finds in the middle of the answer."""
NO_ROUTER = Failure(ErrorCause.CONNECTION, "ClientConnectorError")


def refusal(prompt_tokens: int, max_tokens: int, max_model_len: int) -> Failure | None:
    """Why a worker refuses a request; None: it takes the request.

    After vLLM 0.32 and the emulated worker: a prompt that is longer than `max_model_len`, or an answer that is asked to
    be, does not fit. A prompt of exactly that length leaves no room for a token, which is an error of another kind. An
    answer that is asked to be longer than the rest of the context is no error: it ends there. A request that fits into
    `max_model_len` fits into the cache, too (`EngineConfig`).
    """
    if prompt_tokens > max_model_len or max_tokens > max_model_len:
        return PROMPT_TOO_LONG
    if prompt_tokens == max_model_len:
        return NO_ROOM
    return None
