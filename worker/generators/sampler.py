"""A seeded stand-in for a language model: plain words, and an answer length with a given mean.

The same prompt gets the same answer (a request's `seed` and the choice's index tell answers apart), on every
worker with the same seed: how a request was routed changes when it is answered, never what.

The words are whole tokens that start with a space, so that an answer that comes back in the next turn of a
conversation is tokenised to the same ids again, and its cached blocks are found.
"""

from __future__ import annotations

import hashlib
import math
import random
import re

from kvcache.keys import pack_tokens
from kvcache.tokenizer import Tokenizer, TokenizerError
from worker.generators.base import Ask

_WORD = re.compile("[Ġ▁][a-z]{2,}")
_TRIES = 64
"""Random ids looked at before any will do (a vocabulary without such words)."""


class Sampler:
    """Answers for one tokenizer. `mean_tokens` is the mean length of an answer that nothing else ends."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mean_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._mean_tokens = mean_tokens
        self._is_word: dict[int, bool] = {}

    def answer(self, ask: Ask) -> SampledAnswer:
        digest = hashlib.blake2b(pack_tokens(ask.prompt), digest_size=16)
        digest.update(f"{self._seed}/{ask.seed}/{ask.choice}".encode())
        chance = random.Random(digest.digest())
        eos = None if ask.ignore_eos else self._tokenizer.eos_token_id
        return SampledAnswer(self, chance, eos, self._ends_at(ask, chance))

    def close(self) -> None:
        self._is_word.clear()

    def _ends_at(self, ask: Ask, chance: random.Random) -> int:
        """Index of the end-of-sequence token.

        Lengths are log-normal with a coefficient of variation of 1: real answers have a long tail.
        """
        sigma = math.sqrt(math.log(2.0))
        length = round(chance.lognormvariate(math.log(self._mean_tokens) - sigma**2 / 2, sigma))
        return max(length - 1, ask.min_tokens, 1)

    def word(self, chance: random.Random) -> int:
        """A random token that is a word, or any plain token if the vocabulary has hardly one."""
        for _ in range(_TRIES):
            token = chance.randrange(self._tokenizer.vocab_size)
            if self._word(token):
                return token
        while self._string(token) is None:
            token = chance.randrange(self._tokenizer.vocab_size)
        return token

    def _word(self, token: int) -> bool:
        known = self._is_word.get(token)
        if known is None:
            string = self._string(token)
            known = self._is_word[token] = string is not None and _WORD.fullmatch(string) is not None
        return known

    def _string(self, token: int) -> str | None:
        """The token's form in the vocabulary; None for a special token, and for an id that no token has."""
        if token in self._tokenizer.special_ids:
            return None
        try:
            return self._tokenizer.token_str(token)
        except TokenizerError:
            return None


class SampledAnswer:
    """One answer; every token is ready at once. `eos` None = it has no end of its own."""

    __slots__ = ("_chance", "_ends_at", "_eos", "_sampler", "_tokens")

    def __init__(self, sampler: Sampler, chance: random.Random, eos: int | None, ends_at: int) -> None:
        self._sampler = sampler
        self._chance = chance
        self._eos = eos
        self._ends_at = ends_at
        self._tokens: list[int] = []

    def token(self, index: int) -> int:
        tokens = self._tokens
        while len(tokens) <= index:
            if self._eos is not None and len(tokens) == self._ends_at:
                tokens.append(self._eos)
            else:
                tokens.append(self._sampler.word(self._chance))
        return tokens[index]

    def close(self) -> None:
        return None
