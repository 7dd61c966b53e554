"""Starts the choices of a checked request."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.keys import CacheScope, Image
from kvcache.tokens.tokenizer import IncrementalDecoder
from worker.emulator.async_engine import AsyncEngine
from worker.emulator.engine.request import EngineRequest
from worker.emulator.generators.base import AnswerRequest
from worker.emulator.generators.constrained import constrained_tokens
from worker.emulator.protocol.sampling import Sampling
from worker.emulator.server.generation import Choice, Generation, IncrementalDetokenizer
from worker.emulator.server.rendering import check_prompt
from worker.emulator.server.service import Service

FAVOURED = 20.0
"""A bias from which a token is certain to be chosen, because it outweighs all logits. Its negative excludes a token."""


_SCORED = 100
"""Bytes of text that take as long to tokenise as the log probabilities of one prompt token."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request, with its sampling parameters."""

    tokens: Sequence[int]
    sampling: Sampling
    images: Sequence[Image] = ()
    """Where its images begin, and what identifies them."""


def check(service: Service, prompts: Sequence[Prompt], rank: int | None) -> None:
    """The checks of vLLM's engine when a request for a data-parallel rank (None: any) is submitted. The head of a
    stream has been sent by then.

    Raises `ApiError`.
    """
    for prompt in prompts:
        prompt.sampling.check_model(service.tokenizer)
        service.engines.check(rank)
        check_prompt(prompt.tokens, service.max_model_len, service.tokenizer)
        if not prompt.sampling.beam:
            prompt.sampling.check_prompt(len(prompt.tokens), service.tokenizer)


def start(
    service: Service,
    generation: Generation,
    prompts: Sequence[Prompt],
    scope: CacheScope,
    *,
    streaming: bool,
    rank: int | None,
) -> None:
    """Start the choices of each prompt at the data-parallel rank; without one, each at the rank with the least load.
    Raises `EngineDeadError`."""
    for prompt in prompts:
        for choice in range(prompt.sampling.n):
            chosen = service.engines.choose(rank)
            if not choice:
                chosen.metrics.prompt_accepted(prompt.sampling.n, prompt.sampling.max_tokens)
            _start_choice(service, generation, prompt, choice, scope, streaming, chosen.async_engine)


def _start_choice(
    service: Service,
    generation: Generation,
    prompt: Prompt,
    choice: int,
    scope: CacheScope,
    streaming: bool,
    engine: AsyncEngine,
) -> None:
    sampling, tokenizer = prompt.sampling, service.tokenizer
    favoured, banned = _biased(service, sampling)
    answer = service.generator.answer(
        AnswerRequest(
            prompt.tokens,
            sampling.max_tokens,
            sampling.min_tokens,
            sampling.ignore_eos,
            0.0 if sampling.greedy else sampling.temperature,
            sampling.seed,
            choice,
            top_k=sampling.top_k,
            forced_tokens=constrained_tokens(sampling.structured, tokenizer, (sampling.seed, choice)),
            allowed=favoured or tuple(sampling.allowed_token_ids or ()),
            banned=banned,
            logprobs=sampling.logprobs if sampling.logprob_token_ids is None else 0,
            logprob_token_ids=sampling.logprob_token_ids or (),
            prompt_logprobs=sampling.prompt_logprobs,
        )
    )
    text = None
    if streaming or sampling.stop:
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        text = IncrementalDetokenizer(decoder, tuple(sampling.stop), sampling.include_stop)
    generation.add(
        EngineRequest(
            request_id=service.next_id(),
            prompt=prompt.tokens,
            max_tokens=sampling.max_tokens,
            source=answer,
            scope=scope,
            min_tokens=sampling.min_tokens,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            images=prompt.images,
            image_tokens=service.images.tokens if service.images is not None else 0,
            read_cache=sampling.prompt_logprobs is None,
        ),
        answer,
        text,
        engine,
    )


def _biased(service: Service, sampling: Sampling) -> tuple[tuple[int, ...], frozenset[int]]:
    """The tokens that a bias makes certain, and those that must not be chosen: by a bias, or as the last token of a bad
    word (which vLLM bans only after the word's other tokens)."""
    bias = sampling.logit_bias or {}
    favoured = tuple(token for token, value in bias.items() if value >= FAVOURED)
    banned = [token for token, value in bias.items() if value <= -FAVOURED]
    words = sampling.banned_words(service.tokenizer) if sampling.bad_words else ()
    return favoured, frozenset(itertools.chain(banned, (word[-1] for word in words)))


def scored(prompts: Sequence[Prompt]) -> int:
    """The cost of the prompts' log probabilities, as bytes of text that take as long to tokenise."""
    return sum(_SCORED * len(one.tokens) for one in prompts if one.sampling.prompt_logprobs is not None)


def text_of(service: Service, sampling: Sampling, choice: Choice) -> str:
    """The whole text of a finished choice, of which nothing has been taken before."""
    if choice.text is not None:
        return choice.take()[0]
    tokens = choice.tokens[:-1] if choice.ended_by_token else choice.tokens
    return service.tokenizer.decode(tokens, skip_special_tokens=sampling.skip_special_tokens)
