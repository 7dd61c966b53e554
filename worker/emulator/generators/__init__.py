"""Where the tokens of the answers come from."""

from __future__ import annotations

from kvcache.tokens.tokenizer import Tokenizer
from worker.emulator.generators.base import Generator, GeneratorError
from worker.emulator.generators.sampler import Sampler
from worker.settings import Settings

__all__ = ["Generator", "GeneratorError", "make_generator"]


def make_generator(settings: Settings, tokenizer: Tokenizer) -> Generator:
    """The generator that the settings name. Raises `GeneratorError` when it cannot be loaded."""
    if settings.generator == "sampler":
        return Sampler(tokenizer, settings.seed, settings.mean_output_tokens)
    from worker.emulator.generators.causal_lm import load_causal_lm  # torch takes seconds and hundreds of megabytes

    return load_causal_lm(settings.generator, tokenizer, settings.seed)
