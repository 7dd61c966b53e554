"""A seeded stand-in for a language model: plain words, and an answer length with a given mean.

The same prompt gets the same answer (a request's `seed` and the choice's index tell answers apart), on every
worker with the same seed: how a request was routed changes when it is answered, never what.

The words are whole tokens that start with a space, so that an answer that comes back in the next turn of a
conversation is tokenised to the same ids again, and its cached blocks are found.

Its probabilities are a model of their own: at each place the tokens of the vocabulary stand in a random order, and the
one of rank r has a probability in proportion to 1/r (Zipf's law). The token chosen has rank 1 at temperature 0, and
else a rank drawn by that law, within the request's `top_k`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property

from kvcache.keys import pack_tokens
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError
from worker.emulator.generators.base import Ask, Likely

_WORD = re.compile("[Ġ▁][a-z]{2,}")
_TRIES = 64
"""Random ids looked at before any will do (a vocabulary without such words)."""
_EULER = 0.5772156649015329


class Sampler:
    """Answers for one tokenizer. `mean_tokens` is the mean length of an answer that nothing else ends."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mean_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._mean_tokens = mean_tokens
        self._is_word: dict[int, bool] = {}
        # The first 1/r, added up over the vocabulary: what the probabilities are divided by.
        self._log_total = math.log(math.log(tokenizer.vocab_size) + _EULER)

    def answer(self, ask: Ask) -> SampledAnswer:
        digest = hashlib.blake2b(pack_tokens(ask.prompt), digest_size=16)
        digest.update(f"{self._seed}/{ask.seed}/{ask.choice}".encode())
        key = digest.digest()
        chance = random.Random(key)
        eos = None if ask.ignore_eos else self._tokenizer.eos_token_id
        ends_at = self._ends_at(ask, chance) if ask.text is None else len(ask.text)
        return SampledAnswer(self, ask, key, chance, eos, ends_at)

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

    def permitted(self, chance: random.Random, ask: Ask) -> int:
        """A word within what the request allows and bans."""
        choices = [token for token in ask.allowed if token not in ask.banned] or ask.allowed
        if choices:
            return chance.choice(choices)
        token = self.word(chance)
        for _ in range(_TRIES):
            if token not in ask.banned:
                break
            token = self.word(chance)
        return token

    def likely(self, key: bytes, place: str, token: int, rank: int, top: int) -> list[Likely]:
        """`token`, which has this `rank` there, then the `top` likeliest ones but for itself."""
        found = [self._likely(token, rank)]
        if not top:
            return found
        words, seen = self._words, {token}
        numbers = itertools.islice(_numbers(key, place), _TRIES * top)
        for other in range(1, top + 1):
            if other == rank:
                continue
            candidates = (words[number % len(words)] for number in numbers)
            alternative = next((word for word in candidates if word not in seen), None)
            if alternative is None:
                break  # the vocabulary is as small as that
            seen.add(alternative)
            found.append(self._likely(alternative, other))
        return found

    def ranked(self, key: bytes, place: str, token: int) -> Likely:
        """Any token with a rank of its own there."""
        return self._likely(token, self.rank(key, f"{place}/{token}"))

    def rank(self, key: bytes, place: str, most: int = 0) -> int:
        """A rank by Zipf's law, at most `most` (0 = the vocabulary)."""
        size = self._tokenizer.vocab_size
        return int(min(most or size, size) ** (next(_numbers(key, place)) / 2**32))

    @cached_property
    def _words(self) -> Sequence[int]:
        """Every token that is a word, or every plain one if there are hardly any. 50 ms, for those who ask for it."""
        words = [token for token in range(self._tokenizer.vocab_size) if self._word(token)]
        if len(words) >= _TRIES:
            return words
        return [token for token in range(self._tokenizer.vocab_size) if self._string(token) is not None]

    def _likely(self, token: int, rank: int) -> Likely:
        return Likely(token, -math.log(rank) - self._log_total, rank)

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


def _numbers(key: bytes, place: str) -> Iterator[int]:
    """Random numbers below 2**32, always the same for a key and a place. (Seeding `random` costs ten times as much.)"""
    for block in itertools.count():
        yield from _UNPACK(hashlib.blake2b(f"{place}/{block}".encode(), key=key).digest())


_UNPACK = struct.Struct("<16I").unpack


class SampledAnswer:
    """One answer; every token is ready at once. `eos` None = it has no end of its own."""

    __slots__ = ("_ask", "_chance", "_ends_at", "_eos", "_key", "_limited", "_prompt", "_sampler", "_tokens")

    def __init__(
        self, sampler: Sampler, ask: Ask, key: bytes, chance: random.Random, eos: int | None, ends_at: int
    ) -> None:
        self._sampler = sampler
        self._ask = ask
        self._key = key
        self._chance = chance
        self._eos = eos
        self._ends_at = ends_at
        self._limited = bool(ask.allowed or ask.banned)
        self._tokens: list[int] = []
        self._prompt: list[Sequence[Likely] | None] = []

    def token(self, index: int) -> int:
        tokens = self._tokens
        while len(tokens) <= index:
            tokens.append(self._next(len(tokens)))
        return tokens[index]

    def _next(self, index: int) -> int:
        if self._eos is not None and index == self._ends_at:
            return self._eos
        text = self._ask.text
        if text is not None and index < len(text):
            return text[index]
        return self._sampler.permitted(self._chance, self._ask) if self._limited else self._sampler.word(self._chance)

    def likely(self, index: int) -> list[Likely]:
        ask, sampler, place = self._ask, self._sampler, str(index)
        rank = 1 if ask.temperature == 0.0 else sampler.rank(self._key, f"rank/{place}", max(ask.top_k, 0))
        token = self._tokens[index]
        if ask.others:
            first = sampler.likely(self._key, place, token, rank, 0)
            return first + [sampler.ranked(self._key, place, other) for other in ask.others if other != token]
        return sampler.likely(self._key, place, token, rank, ask.logprobs or 0)

    def likely_prompt(self) -> list[Sequence[Likely] | None]:
        sampler, prompt, top = self._sampler, self._ask.prompt, self._ask.prompt_logprobs or 0
        if not self._prompt:
            key = hashlib.blake2b(pack_tokens(prompt), digest_size=16).digest()  # the same for every answer to it
            self._prompt.append(None)
            for index in range(1, len(prompt)):
                place = f"prompt/{index}"
                rank = sampler.ranked(key, place, prompt[index]).rank
                self._prompt.append(sampler.likely(key, place, prompt[index], rank, top))
        return self._prompt

    def close(self) -> None:
        return None
