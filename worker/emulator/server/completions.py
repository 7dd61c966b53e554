"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from kvcache.errors import ApiError
from worker.asgi import HttpRequest
from worker.emulator.generators.base import TokenLogprob
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.protocol.sampling import sampling_of
from worker.emulator.protocol.validation import parse_request
from worker.emulator.server.generation import Choice, Generation, totals, usage
from worker.emulator.server.logprobs import TokenTexts, completion_logprobs, prompt_logprobs
from worker.emulator.server.rendering import Bounds, completion_prompts
from worker.emulator.server.service import Service, json_body, request_id
from worker.emulator.server.streaming import OpenAIChunks, respond
from worker.emulator.server.submission import Prompt, text_of


async def completions(raw_request: HttpRequest, service: Service) -> None:
    """Answer one completion request. Raises `ApiError` as long as nothing has been sent."""
    raw = await json_body(raw_request)
    await complete(raw_request, service, parse_request(CompletionRequest, raw), len(raw))


async def complete(raw_request: HttpRequest, service: Service, request: CompletionRequest, size: int) -> None:
    """Answer a request that has been read from `size` bytes. Raises `ApiError` as long as nothing has been sent."""
    if request.stream and request.use_beam_search:
        raise ApiError(400, "Streaming is not currently supported with beam search")
    service.check_model(request.model)
    _check_rendering(request)
    bounds = Bounds(
        service.max_model_len,
        request.max_tokens,
        truncate=request.truncate_prompt_tokens,
        side=request.truncation_side,
    )
    tokens = await service.offload(
        size if _has_text(request.prompt) else 0,
        lambda: completion_prompts(
            request.prompt, bounds, service.tokenizer, add_special_tokens=request.add_special_tokens
        ),
    )
    prompts = [Prompt(ids, sampling_of(request, bounds.room(len(ids)))) for ids in tokens]
    service.check_choices(len(prompts) * request.n)
    answer_id = request_id(raw_request, "cmpl", request.request_id)
    answer = _Answer(service, request, prompts, answer_id, int(time.time()))
    await respond(raw_request, service, request, prompts, answer)


def _check_rendering(request: CompletionRequest) -> None:
    """Raises `ApiError` for inputs that vLLM supports only for other kinds of models."""
    if request.suffix is not None:
        if request.echo:
            message = "Echo is unsupported with suffix."
        elif request.prompt_embeds is not None:
            message = "suffix is not supported with prompt_embeds"
        elif request.truncate_prompt_tokens is not None:
            message = "suffix is not supported with truncate_prompt_tokens"
        elif _has_text(request.prompt):
            message = "suffix is only supported for models with FIM completion rendering"
        else:
            message = "suffix requires text prompt input for FIM completion rendering"
        raise ApiError(400, message, param="suffix")
    if request.prompt_embeds not in (None, []):
        if request.echo:
            raise ApiError(400, "Echo is unsupported with prompt embeds.")
        if request.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs is not compatible with prompt embeds.")
        raise ApiError(
            400,
            "You must set `--enable-prompt-embeds` to input `prompt_embeds`. (parameter=prompt_embeds)",
            param="prompt_embeds",
        )


def _has_text(prompt: object) -> bool:
    """Whether a prompt is text. Token ids need no tokenising."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str))


class _Answer:
    """Writes the parts of one answer."""

    def __init__(
        self, service: Service, request: CompletionRequest, prompts: Sequence[Prompt], answer_id: str, created: int
    ) -> None:
        self.service = service
        self.request = request
        self.model = service.answered_as(request.model)
        self.answer_id = answer_id
        self.created = created
        self._prompts = prompts
        self._texts = TokenTexts(service.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))

    def prompt_of(self, choice: Choice) -> Prompt:
        return self._prompts[choice.index // self.request.n]

    def prompt_text(self, choice: Choice) -> str:
        """The text of an echo; empty if token ids are returned instead."""
        if self.request.return_token_ids:
            return ""
        given = self.request.prompt
        if isinstance(given, list) and not isinstance(given[0], int):
            given = given[choice.index // self.request.n]
        if isinstance(given, str) and self.request.truncate_prompt_tokens is None:
            return given
        return self.service.tokenizer.decode(choice.prompt, skip_special_tokens=False)

    def logprobs(self, choice: Choice, tokens: Sequence[int], *, echo: bool, offset: int = 0) -> dict[str, Any] | None:
        """`logprobs` of the last `tokens` of a choice, after those of an echoed prompt."""
        asked = self.request.logprobs
        if asked is None:
            return None
        entries: list[Sequence[TokenLogprob] | None] = []
        shown: list[int] = []
        if echo:
            shown += choice.prompt
            entries += choice.answer.prompt_logprobs()
        if not (echo and self.request.only_echo):
            shown += tokens
            entries += choice.logprobs(len(tokens))
        return completion_logprobs(shown, entries, -1 if self.request.logprob_token_ids else asked, self._texts, offset)

    def formatter(self) -> _ChunkFormatter:
        return _ChunkFormatter(self)

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The whole answer, for a request that does not stream."""
        service, request = self.service, self.request
        choices = generation.choices
        prompt, completion = totals(choices, request.n)
        details = {
            "cached_tokens": _last(choices[-request.n :], generation).cached_tokens,
            "created_cache_tokens": None,
            "multimodal_tokens": None,
        }
        return {
            "id": self.answer_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(choice) for choice in choices],
            "service_tier": None,
            "system_fingerprint": service.fingerprint,
            "usage": {
                **usage(prompt, completion),
                "prompt_tokens_details": (
                    details if service.prompt_tokens_details and not request.use_beam_search else None
                ),
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        request, sampling = self.request, self.prompt_of(choice).sampling
        text = "" if request.only_echo else text_of(self.service, sampling, choice)
        asked = sampling.prompt_logprobs is not None and not sampling.beam
        texts = TokenTexts(self.service.tokenizer)
        return {
            "index": choice.index,
            "text": self.prompt_text(choice) + text if request.echo else text,
            "logprobs": self.logprobs(choice, choice.tokens, echo=bool(request.echo)),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.tokens if request.return_token_ids else None,
            "prompt_logprobs": prompt_logprobs(choice.answer.prompt_logprobs(), texts) if asked else None,
            "prompt_token_ids": choice.prompt if request.return_token_ids else None,
            "routed_experts": None,
        }


def _last(choices: Sequence[Choice], generation: Generation) -> Choice:
    """The choice whose figures vLLM reports for several answers to one prompt: the one that finished last."""
    last = generation.last
    return choices[-1] if last is None or last not in choices else last


class _ChunkFormatter:
    """Writes the chunks of a stream."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._service = service = answer.service
        self._request = request = answer.request
        self._shared = OpenAIChunks(
            service, answer.model, answer.answer_id, answer.created, b"text_completion", request.stream_options
        )
        self._plain = not (request.return_token_ids or self._shared.continuous_usage or request.logprobs is not None)
        self._heads: dict[int, bytes] = {}
        self._offsets: dict[int, int] = {}
        """By choice, the text offset of its next token, for log probabilities."""

    def token(self, choice: Choice) -> bytes:
        """The chunk with what is new of a choice."""
        text, tokens = choice.take()
        head = self._heads.get(choice.index)
        first = head is None
        if head is None:
            head = self._heads[choice.index] = self._shared.head + b'{"index":%d,"text":' % choice.index
        if choice.finish_reason is None and self._plain and not (first and self._request.echo):
            return head + orjson.dumps(text) + _PLAIN_TAIL
        request = self._request
        echo = first and bool(request.echo)
        if echo:
            text = self._answer.prompt_text(choice) + ("" if request.only_echo else text)
        with_ids = request.return_token_ids
        parts = [
            head,
            orjson.dumps(text),
            b',"logprobs":%s,"finish_reason":%s,"stop_reason":%s,"prompt_token_ids":%s,"token_ids":%s}]'
            % (
                orjson.dumps(self._logprobs(choice, tokens, echo)),
                orjson.dumps(choice.finish_reason),
                orjson.dumps(choice.stop_reason),
                orjson.dumps(choice.prompt if echo or (first and with_ids) else None),
                orjson.dumps(tokens if with_ids else None),
            ),
        ]
        if self._shared.continuous_usage:
            parts.append(b',"usage":' + orjson.dumps(usage(choice.prompt_tokens, len(choice.tokens))))
        elif choice.finish_reason is not None and not self._shared.usage:
            parts.append(self._shared.fingerprint)
        return b"".join((*parts, b"}\n\n"))

    def _logprobs(self, choice: Choice, tokens: Sequence[int], echo: bool) -> dict[str, Any] | None:
        found = self._answer.logprobs(choice, tokens, echo=echo, offset=self._offsets.get(choice.index, 0))
        if found is not None and found["tokens"]:
            self._offsets[choice.index] = found["text_offset"][-1] + len(found["tokens"][-1])
        return found

    def first(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The usage chunk, if the request asks for it."""
        if not self._shared.usage:
            return b""
        prompt, completion = totals(choices, self._request.n)
        counts = usage(prompt, completion)
        if self._service.prompt_tokens_details:
            counts["prompt_tokens_details"] = {"cached_tokens": choices[0].cached_tokens}
        return self._shared.usage_chunk(counts)


_PLAIN_TAIL = (
    b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
)
