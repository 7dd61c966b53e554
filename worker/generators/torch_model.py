"""A causal language model of `transformers` on the CPU. Importing this module imports torch."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from worker.generators.base import GeneratorError


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

    def step(
        self, tokens: Sequence[int], past: Any, temperature: float, chance: random.Random, banned: int | None
    ) -> tuple[int, Any]:
        with torch.inference_mode():
            answer = self._model(input_ids=torch.tensor([list(tokens)]), use_cache=True, **{self._cache: past})
            logits = answer.logits[0, -1, : self._vocab_size].float()
            if banned is not None:
                logits[banned] = -torch.inf
            if temperature == 0.0:
                return int(logits.argmax()), answer[self._cache]
            cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(-1)
            drawn = torch.searchsorted(cumulative, chance.random() * float(cumulative[-1]))
        return min(int(drawn), self._vocab_size - 1), answer[self._cache]
