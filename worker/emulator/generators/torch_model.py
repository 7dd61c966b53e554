"""A causal language model of `transformers` on the CPU. Importing this module imports torch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from worker.emulator.generators.base import GeneratorError, Likely
from worker.emulator.generators.causal_lm import Draw, Drawn


class TorchModel:
    """A `StepModel`. `vocab_size` is the tokenizer's: the model may have more rows, padding, which it never chooses.

    Raises `GeneratorError` when the model cannot be loaded or is not this tokenizer's.
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
        # transformers calls it `cache` since 5.24; what it called it before is given up in 5.40.
        forward = inspect.signature(self._model.forward).parameters
        self._cache = "cache" if "cache" in forward else "past_key_values"
        self.window: int = getattr(config, "max_position_embeddings", 2048)
        self._vocab_size = vocab_size

    def step(self, tokens: Sequence[int], past: Any, draw: Draw) -> Drawn:
        with torch.inference_mode():
            answer = self._model(input_ids=torch.tensor([list(tokens)]), use_cache=True, **{self._cache: past})
            every = answer.logits[0, :, : self._vocab_size].float()
            token = self._choose(every[-1].clone(), draw)
            likely: Sequence[Likely] = ()
            prompt: list[Sequence[Likely]] = []
            if draw.logprobs is not None:
                likely = _likely(torch.log_softmax(every[-1], dim=-1), token, draw.logprobs, draw.others)
            if draw.prompt_logprobs is not None:
                logprobs = torch.log_softmax(every, dim=-1)
                prompt = [
                    _likely(logprobs[at], following, draw.prompt_logprobs) for at, following in enumerate(tokens[1:])
                ]
        return Drawn(token, answer[self._cache], likely, prompt)

    def _choose(self, logits: torch.Tensor, draw: Draw) -> int:
        if draw.allowed:
            kept = logits[list(draw.allowed)]
            logits.fill_(-torch.inf)
            logits[list(draw.allowed)] = kept
        if draw.banned:
            logits[list(draw.banned)] = -torch.inf
        if draw.temperature == 0.0:
            return int(logits.argmax())
        if 0 < draw.top_k < len(logits):
            logits[logits < torch.topk(logits, draw.top_k).values[-1]] = -torch.inf
        cumulative = torch.softmax(logits / draw.temperature, dim=-1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, draw.chance.random() * float(cumulative[-1]))
        return min(int(drawn), self._vocab_size - 1)


def _likely(logprobs: torch.Tensor, token: int, top: int, others: Sequence[int] = ()) -> list[Likely]:
    """The token, then the others, or else the likeliest ones, without repeating it."""

    def one(which: int) -> Likely:
        value = logprobs[which]
        return Likely(which, float(value), int((logprobs > value).sum()) + 1)

    named = others or [int(which) for which in torch.topk(logprobs, min(top, len(logprobs))).indices]
    return [one(token), *(one(which) for which in named if which != token)]
