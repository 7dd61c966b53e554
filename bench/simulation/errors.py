"""What a client gets instead of an answer, in the words that a live run records."""

from __future__ import annotations

from typing import NamedTuple

from bench.record import ErrorCause


class Failure(NamedTuple):
    """`Record.error` and `Record.detail` of a request."""

    cause: ErrorCause
    detail: str
    in_stream: bool = False
    """Whether it comes as an event of a stream that has begun."""


PROMPT_TOO_LONG = Failure(ErrorCause.PROMPT_TOO_LONG, "HTTP 400 BadRequestError")
NO_ROOM = Failure(ErrorCause.BROKEN_STREAM, "error event: BadRequestError", in_stream=True)
NO_WORKER = Failure(ErrorCause.UNAVAILABLE, "HTTP 503 ServiceUnavailableError")
STREAM_BROKEN = Failure(ErrorCause.BROKEN_STREAM, "error event: InternalServerError", in_stream=True)
"""What a router writes at the end of a stream whose worker failed."""
ROUTER_LOST = Failure(ErrorCause.CONNECTION, "ServerDisconnectedError")
"""What a client finds when a router's process ends before its answer began."""
STREAM_LOST = Failure(ErrorCause.CONNECTION, "ClientPayloadError")
"""What it finds in the middle of the answer."""
NO_ROUTER = Failure(ErrorCause.CONNECTION, "ClientConnectorError")


def refusal(prompt_tokens: int, max_tokens: int, max_model_len: int, *, streaming: bool) -> Failure | None:
    """Why a worker refuses a request; None: it takes the request.

    After vLLM 0.32 and the emulated worker: a prompt that is longer than `max_model_len`, or an answer that is asked to
    be, is refused before the stream begins. A prompt of exactly that length leaves no room for a token, which the
    engine finds out after the head of the stream has been sent. An answer that is asked to be longer than the rest of
    the context is no error: it ends there. A request that fits into `max_model_len` fits into the cache, too
    (`EngineConfig`).
    """
    if prompt_tokens > max_model_len or max_tokens > max_model_len:
        return PROMPT_TOO_LONG
    if prompt_tokens == max_model_len:
        return NO_ROOM if streaming else PROMPT_TOO_LONG
    return None
