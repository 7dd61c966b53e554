"""Answers of the router's own, in the shape of vLLM and OpenAI."""

from __future__ import annotations

from math import ceil

import orjson

from kvcache.errors import ApiError, MessagesError
from router.core.decision import StoredResponse
from router.server.admission import SHED_HEADER, Shed
from router.server.client_answer import ClientAnswer
from runtime.http.context import Headers


def response_not_found(stored: StoredResponse) -> ApiError:
    """vLLM's error for a response that is not stored, and why that is so, as far as its id says."""
    message = f"Response with id '{stored.name}' not found."
    if stored.tag is not None:
        message += (
            " The worker that stored it has left, and its stored responses with it: send the whole conversation as"
            " `input`, without `previous_response_id`."
        )
    return ApiError(404, message, param="response_id", type="invalid_request_error")


def answer_shed(answer: ClientAnswer, shed: Shed, request_id: bytes, *, messages: bool) -> int:
    """The answer to a request that flow control turned away. Returns its status. `messages`: in the format of the
    Messages API."""
    error = ApiError(shed.status, str(shed), type="rate_limit_error" if shed.status == 429 else None)
    headers = [
        (b"x-request-id", request_id),
        (b"retry-after", b"%d" % ceil(shed.retry_after)),
        (SHED_HEADER, shed.reason.value.encode()),
    ]
    answer_error(answer, MessagesError(error) if messages else error, headers)
    return error.status


def answer_error(answer: ClientAnswer, error: ApiError, headers: Headers) -> None:
    """An error."""
    answer_json(answer, error.status, orjson.dumps(error.body()), headers)


def answer_json(answer: ClientAnswer, status: int, body: bytes, headers: Headers) -> None:
    """A whole answer in JSON; `headers` come after its type and its length."""
    length = (b"content-length", b"%d" % len(body))
    answer.whole(status, [(b"content-type", b"application/json"), length, *headers], body)
