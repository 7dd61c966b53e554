"""A seeded replacement of a language model: English words, and answers whose lengths have a given mean.

The same prompt gets the same answer on every worker with the same seed; only a request's `seed` and the index of the
choice vary it. How a request is routed therefore affects when it is answered, but never the answer. As in a language
model, a token depends on the tokens before it and not on where the prompt ends: a prompt that ends with the first half
of an answer is continued with the second half. Only the length of the answer is drawn anew.

Each word is one token that starts with a space. An answer that returns in the next turn of a conversation is therefore
tokenised to the same ids, and its cached blocks are found.

The probabilities come from a model of their own: at each position the tokens of the vocabulary are in a random order,
and the token of rank r has a probability in proportion to 1/r (Zipf's law). The chosen token has rank 1 at temperature
0, and otherwise a rank drawn by that law within the request's `top_k`.
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
from worker.emulator.generators.base import AnswerRequest, TokenLogprob

_WORD = re.compile("[Ġ▁][a-z]{2,}")
_TRIES = 64
"""Random ids to try before any token is taken, for vocabularies without such words."""
_EULER = 0.5772156649015329


class Sampler:
    """Generates answers for one tokenizer. `mean_tokens`: mean length of answers that end by themselves."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mean_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._mean_tokens = mean_tokens
        self._is_word: dict[int, bool] = {}
        # The sum of 1/r over the vocabulary, by which the probabilities are divided.
        self._log_total = math.log(math.log(tokenizer.vocab_size) + _EULER)

    def answer(self, request: AnswerRequest) -> SampledAnswer:
        context = hashlib.blake2b(f"{self._seed}/{request.seed}/{request.choice}/".encode(), digest_size=16)
        context.update(pack_tokens(request.prompt))
        key = context.digest()
        eos = None if request.ignore_eos else self._tokenizer.eos_token_id
        forced = request.forced_tokens
        ends_at = self._ends_at(request, random.Random(key)) if forced is None else len(forced)
        return SampledAnswer(self, request, key, context, eos, ends_at)

    def close(self) -> None:
        self._is_word.clear()

    def _ends_at(self, request: AnswerRequest, rng: random.Random) -> int:
        """The index of the end-of-sequence token.

        Lengths are log-normal with a coefficient of variation of 1, because real answers have a long tail.
        """
        sigma = math.sqrt(math.log(2.0))
        length = round(rng.lognormvariate(math.log(self._mean_tokens) - sigma**2 / 2, sigma))
        return max(length - 1, request.min_tokens, 1)

    def word(self, numbers: Iterator[int]) -> int:
        """A random token that is a word, or any ordinary token if the vocabulary has hardly any words."""
        size = self._tokenizer.vocab_size
        for number in itertools.islice(numbers, _TRIES):
            if self._word(number % size):
                return number % size
        return next(number % size for number in numbers if self._string(number % size) is not None)

    def permitted(self, numbers: Iterator[int], request: AnswerRequest) -> int:
        """A random word that the request allows and does not ban."""
        choices = [token for token in request.allowed if token not in request.banned] or request.allowed
        if choices:
            return choices[next(numbers) % len(choices)]
        token = self.word(numbers)
        for _ in range(_TRIES):
            if token not in request.banned:
                break
            token = self.word(numbers)
        return token

    def logprobs(self, key: bytes, place: str, token: int, rank: int, top: int) -> list[TokenLogprob]:
        """`token`, which has this `rank` at this place, then the `top` likeliest tokens without it."""
        found = [self._logprob(token, rank)]
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
                break  # the vocabulary has no more tokens
            seen.add(alternative)
            found.append(self._logprob(alternative, other))
        return found

    def ranked(self, key: bytes, place: str, token: int) -> TokenLogprob:
        """A token with its rank at this place, which depends on nothing else."""
        return self._logprob(token, self.rank(key, f"{place}/{token}"))

    def rank(self, key: bytes, place: str, most: int = 0) -> int:
        """A rank drawn by Zipf's law, at most `most` (0: the size of the vocabulary)."""
        size = self._tokenizer.vocab_size
        return int(min(most or size, size) ** (next(_numbers(key, place)) / 2**32))

    @cached_property
    def _words(self) -> Sequence[int]:
        """Every token that is a word, or every ordinary token if there are hardly any words. Takes 50 ms, at first
        use."""
        words = [token for token in range(self._tokenizer.vocab_size) if self._word(token)]
        if len(words) >= _TRIES:
            return words
        return [token for token in range(self._tokenizer.vocab_size) if self._string(token) is not None]

    def _logprob(self, token: int, rank: int) -> TokenLogprob:
        return TokenLogprob(token, -math.log(rank) - self._log_total, rank)

    def _word(self, token: int) -> bool:
        known = self._is_word.get(token)
        if known is None:
            string = self._string(token)
            known = self._is_word[token] = string is not None and _WORD.fullmatch(string) is not None
        return known

    def _string(self, token: int) -> str | None:
        """The token's form in the vocabulary. None for a special token, and for an id without a token."""
        if token in self._tokenizer.special_ids:
            return None
        try:
            return self._tokenizer.token_str(token)
        except TokenizerError:
            return None


def _numbers(key: bytes, place: str) -> Iterator[int]:
    """Random numbers below 2**32, the same for each key and place. (Seeding `random` takes ten times as long.)"""
    for block in itertools.count():
        yield from _UNPACK(hashlib.blake2b(f"{place}/{block}".encode(), key=key).digest())


_UNPACK = struct.Struct("<16I").unpack
_PACK = struct.Struct("<I").pack


class SampledAnswer:
    """One answer, whose tokens are always ready. `eos` None: it does not end by itself."""

    __slots__ = ("_context", "_ends_at", "_eos", "_key", "_limited", "_prompt", "_request", "_sampler", "_tokens")

    def __init__(
        self,
        sampler: Sampler,
        request: AnswerRequest,
        key: bytes,
        context: hashlib.blake2b,
        eos: int | None,
        ends_at: int,
    ) -> None:
        self._sampler = sampler
        self._request = request
        self._key = key
        self._context = context
        """The hash of the tokens so far."""
        self._eos = eos
        self._ends_at = ends_at
        self._limited = bool(request.allowed or request.banned)
        self._tokens: list[int] = []
        self._prompt: list[Sequence[TokenLogprob] | None] = []

    def token(self, index: int) -> int:
        tokens = self._tokens
        while len(tokens) <= index:
            token = self._next(len(tokens))
            tokens.append(token)
            self._context.update(_PACK(token))
        return tokens[index]

    def _next(self, index: int) -> int:
        if self._eos is not None and index == self._ends_at:
            return self._eos
        text = self._request.forced_tokens
        if text is not None and index < len(text):
            return text[index]
        numbers = _numbers(self._context.digest(), "token")
        return self._sampler.permitted(numbers, self._request) if self._limited else self._sampler.word(numbers)

    def logprobs(self, index: int) -> list[TokenLogprob]:
        request, sampler, place = self._request, self._sampler, str(index)
        rank = 1 if request.temperature == 0.0 else sampler.rank(self._key, f"rank/{place}", max(request.top_k, 0))
        token = self._tokens[index]
        if request.logprob_token_ids:
            first = sampler.logprobs(self._key, place, token, rank, 0)
            return first + [
                sampler.ranked(self._key, place, other) for other in request.logprob_token_ids if other != token
            ]
        return sampler.logprobs(self._key, place, token, rank, request.logprobs or 0)

    def prompt_logprobs(self) -> list[Sequence[TokenLogprob] | None]:
        sampler, prompt, top = self._sampler, self._request.prompt, self._request.prompt_logprobs or 0
        if not self._prompt:
            key = hashlib.blake2b(pack_tokens(prompt), digest_size=16).digest()  # the same for every answer to it
            self._prompt.append(None)
            for index in range(1, len(prompt)):
                place = f"prompt/{index}"
                rank = sampler.ranked(key, place, prompt[index]).rank
                self._prompt.append(sampler.logprobs(key, place, prompt[index], rank, top))
        return self._prompt

    def close(self) -> None:
        return None
