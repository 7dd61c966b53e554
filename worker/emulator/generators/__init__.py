"""Generators: the sources of the answers' tokens."""

from __future__ import annotations

from kvcache.tokens.tokenizer import Tokenizer
from worker.emulator.generators.base import Generator, GeneratorError
from worker.emulator.generators.sampler import Sampler

__all__ = ["Generator", "GeneratorError", "make_generator"]


def make_generator(name: str, tokenizer: Tokenizer, *, seed: int, mean_tokens: int) -> Generator:
    """The generator of this name: "sampler", or a causal language model. `mean_tokens` is the sampler's mean length of
    an answer. Raises `GeneratorError` when a model cannot be loaded."""
    if name == "sampler":
        return Sampler(tokenizer, seed, mean_tokens)
    from worker.emulator.generators.causal_lm import load_causal_lm  # torch takes seconds and hundreds of megabytes

    return load_causal_lm(name, tokenizer, seed)
