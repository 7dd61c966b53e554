"""A causal language model of `transformers` on the CPU. Importing this module imports torch."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from worker.emulator.generators.base import AnswerRequest, GeneratorError, TokenLogprob
from worker.emulator.generators.causal_lm import SamplerOutput


class TorchModel:
    """A `StepModel`. `vocab_size` is the tokenizer's: further rows of the model are padding, and never chosen.

    Raises `GeneratorError` if the model cannot be loaded, or has fewer tokens than the tokenizer.
    """

    def __init__(self, name: str, vocab_size: int) -> None:
        torch.set_num_threads(1)  # the emulation needs the other cores
        transformers.utils.logging.disable_progress_bar()
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(name).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise GeneratorError(
                f"--generator {name}: the model cannot be loaded ({reason}). Give a folder that holds its weights, or "
                "use --generator sampler"
            ) from None
        config = self._model.config
        if config.vocab_size < vocab_size:
            raise GeneratorError(
                f"--generator {name}: the model has {config.vocab_size} tokens, the tokenizer {vocab_size}. "
                f"Use the model's own: --tokenizer {name}"
            )
        # transformers has called the argument `cache` since 5.24, and drops the older name in 5.40.
        forward = inspect.signature(self._model.forward).parameters
        self._cache = "cache" if "cache" in forward else "past_key_values"
        self.window: int = getattr(config, "max_position_embeddings", 2048)
        self._vocab_size = vocab_size

    def step(self, tokens: Sequence[int], past: Any, request: AnswerRequest, rng: random.Random) -> SamplerOutput:
        with torch.inference_mode():
            answer = self._model(input_ids=torch.tensor([list(tokens)]), use_cache=True, **{self._cache: past})
            every = answer.logits[0, :, : self._vocab_size].float()
            token = self._choose(every[-1].clone(), request, rng)
            token_logprobs: Sequence[TokenLogprob] = ()
            prompt_logprobs: list[Sequence[TokenLogprob]] = []
            if request.logprobs is not None:
                token_logprobs = _token_logprobs(
                    torch.log_softmax(every[-1], dim=-1), token, request.logprobs, request.logprob_token_ids
                )
            if request.prompt_logprobs is not None:
                logprobs = torch.log_softmax(every, dim=-1)
                prompt_logprobs = [
                    _token_logprobs(logprobs[at], following, request.prompt_logprobs)
                    for at, following in enumerate(tokens[1:])
                ]
        return SamplerOutput(token, answer[self._cache], token_logprobs, prompt_logprobs)

    def _choose(self, logits: torch.Tensor, request: AnswerRequest, rng: random.Random) -> int:
        if request.allowed:
            kept = logits[list(request.allowed)]
            logits.fill_(-torch.inf)
            logits[list(request.allowed)] = kept
        if request.banned:
            logits[list(request.banned)] = -torch.inf
        if request.temperature == 0.0:
            return int(logits.argmax())
        if 0 < request.top_k < len(logits):
            logits[logits < torch.topk(logits, request.top_k).values[-1]] = -torch.inf
        cumulative = torch.softmax(logits / request.temperature, dim=-1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, rng.random() * float(cumulative[-1]))
        return min(int(drawn), self._vocab_size - 1)


def _token_logprobs(
    logprobs: torch.Tensor, token: int, top: int, logprob_token_ids: Sequence[int] = ()
) -> list[TokenLogprob]:
    """The token, then `logprob_token_ids` or else the `top` likeliest tokens, without repeating it."""

    def one(which: int) -> TokenLogprob:
        value = logprobs[which]
        return TokenLogprob(which, float(value), int((logprobs > value).sum()) + 1)

    named = logprob_token_ids or [int(which) for which in torch.topk(logprobs, min(top, len(logprobs))).indices]
    return [one(token), *(one(which) for which in named if which != token)]
