"""Reads a request's body for what a routing decision needs: its block keys, its length, whether it streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvcache.images import image_parts
from kvcache.keys import CacheScope, Image, PrefixKeys, TokenIdError, pack_tokens
from kvcache.prompts import (
    PromptError,
    chat_request_prompt,
    completion_request_prompts,
    image_request_prompt,
    messages_chat_fields,
    request_scope,
    responses_chat_fields,
)
from kvcache.tokens.tokenizer import Tokenizer, TooManyTokensError
from router.core.catalogue import OWN_TOKENIZER, Catalogue, Served
from router.core.decision import ReportedSequence, RouteRequest, Unread
from router.server import bodies
from router.server.affinity import RESPONSES, affine, affine_ends
from router.server.measured import MeasuredKeys
from router.server.prompt_queue import READ_TIMEOUT, Checkpoint, PromptQueue

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
INVOCATIONS = "/invocations"
"""SageMaker's path, for chat and completion requests alike."""

PROMPTED = frozenset({COMPLETIONS, CHAT, MESSAGES, RESPONSES, INVOCATIONS})
"""The paths whose requests have a prompt that fills the engine's cache, and that is read here."""

PROMPTLESS = RouteRequest(keys=None, prompt_tokens=None, streaming=False, prompted=False)
"""A request without a prompt."""

_TO_CHAT: Mapping[str, Callable[[Mapping[str, Any], Tokenizer], dict[str, Any]]] = {
    MESSAGES: messages_chat_fields,
    RESPONSES: responses_chat_fields,
}
"""Of the APIs whose requests vLLM turns into chat requests: how."""
_OUTPUT_TOKENS: Mapping[str, tuple[str, ...]] = {MESSAGES: ("max_tokens",), RESPONSES: ("max_output_tokens",)}

INLINE_TEXT = 16_384
"""A body with more bytes than this is tokenized in a thread: 8 ms at 2 MB/s would delay every other request."""
INLINE_BODY = 131_072
"""A body with more bytes than this is parsed in a thread even if it holds token ids, which take 1 ms to parse then."""
LONG_DEPTH = 2048
"""A prompt of more blocks than this has its keys computed in the thread: they would take 2 ms on the event loop."""

BYTES_PER_TOKEN = 16
"""A body with more bytes than this for each token of the longest context is not read. Text has 3 to 5 bytes a token,
and up to 12 when it is escaped as `\\uXXXX`."""
UNKNOWN_CONTEXT = 262_144
"""Tokens of the longest context as long as no worker has stated its own."""
OTHER_FIELDS = 65_536
"""Bytes that a body may hold besides its prompt: tools, schemas."""

_EXACT = frozenset({"tools", "chat_template_kwargs"})
"""Fields whose numbers a chat template may write into the prompt, so that they must be read exactly."""
_EXACT_BY_PATH: Mapping[str, frozenset[str]] = {MESSAGES: _EXACT | {"messages"}}
"""A message of the Messages API holds the arguments of tool calls as objects, not as text."""


class PromptReader:
    """Reads prompts as the workers do. A body that cannot be read is left to the worker, whose error the client gets.

    `catalogue()` gives what is served now: the model of a request decides which tokenizer reads its prompt, how long it
    may be, and whether it is an adapter's. `tokenizer` is that of the router's own model; `tokenizers` has those of
    others, by model (`Served.tokenizer`). While a tokenizer is being loaded, or cannot be loaded, prompts of its model
    are not read. `timeout`: seconds that a request waits for its prompt to be read in a thread.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        block_size: int,
        catalogue: Callable[[], Catalogue] = Catalogue,
        timeout: float = READ_TIMEOUT,
    ) -> None:
        self.tokenizer = tokenizer
        self._block_size = block_size
        self.tokenizers: dict[str, Tokenizer] = {}
        self._catalogue = catalogue
        self._queue = PromptQueue(timeout)

    def close(self) -> None:
        self._queue.close()

    async def read(
        self, path: str, body: bytes, adapter: str | None = None, clock: Callable[[], float] | None = None
    ) -> RouteRequest:
        """What the router knows about a request for one of `PROMPTED`. If its prompt was not read, `keys` is None and
        `unread` says why. `adapter`: what a header of a request for `INVOCATIONS` names as its model. With a `clock`,
        the keys are `MeasuredKeys`."""
        route = self.read_at_once(path, body, adapter, clock)
        if route is not None:
            return route
        catalogue = self._catalogue()
        try:
            return await self._queue.run(
                len(body), lambda checkpoint: self._read(path, body, catalogue, adapter, clock, checkpoint)
            )
        except TimeoutError:
            return _unparsed(path, body, Unread.BUSY, adapter)

    def read_at_once(
        self, path: str, body: bytes, adapter: str | None = None, clock: Callable[[], float] | None = None
    ) -> RouteRequest | None:
        """As `read`; None if that would delay other requests: a thread has to read it."""
        size, catalogue = len(body), self._catalogue()
        if size > OTHER_FIELDS and (
            size > (catalogue.max_model_len or UNKNOWN_CONTEXT) * BYTES_PER_TOKEN + OTHER_FIELDS
        ):
            return _unparsed(path, body, Unread.TOO_LONG, adapter)
        if size <= INLINE_BODY:
            fields = bodies.parse(body, _EXACT_BY_PATH.get(path, _EXACT))
            if fields is None:
                return _no_request()
            if size <= INLINE_TEXT or _is_token_ids(fields.get("prompt")):
                return self._route(path, fields, catalogue, adapter, clock)
        return None

    def _read(
        self,
        path: str,
        body: bytes,
        catalogue: Catalogue,
        adapter: str | None,
        clock: Callable[[], float] | None,
        checkpoint: Checkpoint,
    ) -> RouteRequest:
        fields = bodies.parse(body, _EXACT_BY_PATH.get(path, _EXACT))
        if fields is None:
            return _no_request()
        route = self._route(path, fields, catalogue, adapter, clock, checkpoint)
        if route.keys is not None and route.keys.depth > LONG_DEPTH:
            route.keys.compute(checkpoint)
        return route

    def known(self, model: str | None) -> tuple[Tokenizer | None, int | None]:
        """The tokenizer that reads prompts for this model, and the most tokens of one request. None where that is not
        known."""
        catalogue = self._catalogue()
        served = catalogue.find(model)
        return self._tokenizer(served), catalogue.max_model_len if served is None else served.max_model_len

    def _tokenizer(self, served: Served | None) -> Tokenizer | None:
        """The tokenizer that reads a prompt for this model, if the router has it."""
        if served is None or served.tokenizer == OWN_TOKENIZER:
            return self.tokenizer
        return None if served.tokenizer is None else self.tokenizers.get(served.tokenizer)

    def _route(
        self,
        path: str,
        fields: Mapping[str, Any],
        catalogue: Catalogue,
        adapter: str | None,
        clock: Callable[[], float] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> RouteRequest:
        if path == INVOCATIONS:
            path, fields = _invoked(fields, catalogue, adapter)
        return affine(self._read_prompt(path, fields, catalogue, clock, checkpoint), path, fields)

    def _read_prompt(
        self,
        path: str,
        fields: Mapping[str, Any],
        catalogue: Catalogue,
        clock: Callable[[], float] | None,
        checkpoint: Checkpoint | None,
    ) -> RouteRequest:
        model = bodies.model(fields)
        served = catalogue.find(model)
        known = self._tokenizer(served)
        if known is None:
            return _unread(Unread.NO_TOKENIZER, path, fields)
        longest = catalogue.max_model_len if served is None else served.max_model_len
        if path == INVOCATIONS:
            return _unread(Unread.UNREADABLE, path, fields)
        streaming = fields.get("stream") is True
        began = clock() if clock is not None else 0.0
        try:
            if (to_chat := _TO_CHAT.get(path)) is not None:
                path, fields = CHAT, to_chat(fields, known)
            # With `truncate_prompt_tokens` the prompt may be longer than a worker's context: the worker cuts it down.
            limit = longest if fields.get("truncate_prompt_tokens") is None else None
            tokenizer = known.bounded(limit, checkpoint or Checkpoint())
            images: list[Image] = []
            length = 0
            if path == CHAT and any(image_parts(fields.get("messages"))):
                read = image_request_prompt(fields, tokenizer, None if served is None else served.images)
                prompts, images, length = [read.tokens], read.images, read.length
            elif path == CHAT:
                prompts = [chat_request_prompt(fields, tokenizer, longest)]
            else:
                prompts = completion_request_prompts(fields, tokenizer, longest)
            scope = request_scope(fields, catalogue.adapter(model))
            # All prompts of a request go to one worker. The first one's keys decide which.
            packed, size = pack_tokens(prompts[0]), self._block_size
            keys = (
                PrefixKeys(packed, size, scope, images)
                if clock is None
                else MeasuredKeys(packed, size, scope, images, clock, clock() - began)
            )
            reported = _reported_sequence(fields, prompts, keys, self._block_size, scope, streaming=streaming)
        except (PromptError, TokenIdError):
            return _unread(Unread.UNREADABLE, path, fields)
        except TooManyTokensError:
            return _unread(Unread.TOO_LONG, path, fields)
        if limit is not None and max(map(len, prompts)) > limit:
            return _unread(Unread.TOO_LONG, path, fields)
        uses_cache = not _bypasses_cache(fields, chat=path == CHAT)
        return RouteRequest(
            keys=keys if uses_cache else None,
            prompt_tokens=length or sum(len(prompt) for prompt in prompts),
            streaming=streaming,
            model=model,
            output_tokens=_output_tokens(path, fields),
            reported=reported if uses_cache else None,
        )


def promptless(body: bytes) -> RouteRequest:
    """The route of a request without a prompt that is read here: only its model matters."""
    name = bodies.model_of(body) if body else None
    return PROMPTLESS if name is None else replace(PROMPTLESS, model=name)


def _invoked(fields: Mapping[str, Any], catalogue: Catalogue, adapter: str | None) -> tuple[str, Mapping[str, Any]]:
    """The path and the fields that a request for `INVOCATIONS` stands for. vLLM takes it for a chat if it fits one,
    else for a completion; a body that may be either is not read, and stays where it is.

    vLLM ignores the `model`: a header names the adapter. Without that header it chooses among the models here.
    """
    if adapter is None:
        served = catalogue.find(bodies.model(fields))
        fields = {**fields, "model": None if served is None else served.model}
    else:
        fields = {**fields, "model": adapter}
    match "messages" in fields, "prompt" in fields:
        case True, False:
            return CHAT, fields
        case False, True:
            return COMPLETIONS, fields
        case _:
            return INVOCATIONS, fields


def _reported_sequence(
    fields: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    keys: PrefixKeys,
    block_size: int,
    scope: CacheScope,
    *,
    streaming: bool,
) -> ReportedSequence | None:
    """The sequence of the request that its answer's `cached_tokens` is about. None: it is the first prompt, whose keys
    are `keys`, and nothing was computed just before it.

    One request may compute several sequences: `n` of one prompt, or a list of prompts. vLLM 0.32 reports the figure of
    one of them (measured): the last one's in a whole answer, the first one's in a stream. A later sequence finds in the
    cache what those before it, of the same request, have just put there.
    """
    n = fields.get("n")
    siblings = isinstance(n, int) and n > 1
    if streaming or (len(prompts) == 1 and not siblings):
        return None
    *before, last = prompts
    reusable = max(len(last) - 1, 0) // block_size
    computed = len(last) if siblings else max(_common_length(prompt, last) for prompt in before)
    if len(prompts) > 1:
        keys = PrefixKeys(pack_tokens(last), block_size, scope)
    return ReportedSequence(keys, min(keys.depth, reusable), min(computed // block_size, reusable))


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest prefix that two prompts have in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _bypasses_cache(fields: Mapping[str, Any], *, chat: bool) -> bool:
    """Whether the engine computes the whole prompt whatever it holds, because its log-probabilities are asked for."""
    if fields.get("prompt_logprobs") is not None:
        return True
    asked = fields.get("top_logprobs", 0) if chat else fields.get("logprobs")
    return fields.get("echo") is True and asked is not None


def _no_request() -> RouteRequest:
    """For a body that is no JSON object."""
    return replace(PROMPTLESS, unread=Unread.UNREADABLE)


def _unread(why: Unread, path: str, fields: Mapping[str, Any]) -> RouteRequest:
    return RouteRequest(
        keys=None,
        prompt_tokens=None,
        streaming=fields.get("stream") is True,
        model=bodies.model(fields),
        output_tokens=_output_tokens(path, fields),
        unread=why,
    )


def _unparsed(path: str, body: bytes, why: Unread, adapter: str | None) -> RouteRequest:
    name, streaming = bodies.scan(body)
    route = RouteRequest(keys=None, prompt_tokens=None, streaming=streaming, model=adapter or name, unread=why)
    return affine_ends(route, path, body[: bodies.SCANNED] + body[-bodies.SCANNED :])


def _output_tokens(path: str, fields: Mapping[str, Any]) -> int | None:
    for name in _OUTPUT_TOKENS.get(path, ("max_completion_tokens", "max_tokens")):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _is_token_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
