"""A seeded stand-in for a language model's sampler, without state: every token is a pure function of a name.

The same name gives the same answer on every engine with the same seed, whatever else runs and in whatever order it is
asked. So how a request was routed changes when it is answered, never what is answered.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from kvcache.keys import pack_tokens

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """64 well-mixed bits of any 64 (splitmix64's finaliser, Steele et al. 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def request_name(prompt: Sequence[int], request_seed: int | None = None, choice: int = 0) -> bytes:
    """Names an answer by its prompt, the request's `seed` if it has one and the choice's index: O(prompt)."""
    digest = hashlib.blake2b(pack_tokens(prompt), digest_size=16)
    digest.update(f"/{request_seed}/{choice}".encode())
    return digest.digest()


class SeededSource:
    """A `TokenSource` whose tokens are always ready.

    `vocabulary` holds the ids to choose from (word-like ones give readable text); it should not contain
    `eos_token_id`. The length of the answer, end-of-sequence token included, is geometric with mean `mean_tokens`, but
    more than `min_tokens`. With `ignore_eos`, or without an end-of-sequence token, the answer never ends by itself.
    """

    __slots__ = ("_count", "_eos", "_last", "_start", "_vocabulary")

    def __init__(
        self,
        seed: int,
        name: bytes,
        *,
        vocabulary: Sequence[int],
        mean_tokens: float,
        eos_token_id: int | None,
        min_tokens: int = 0,
        ignore_eos: bool = False,
    ) -> None:
        if not vocabulary:
            raise ValueError("the vocabulary is empty; give at least one token id")
        if mean_tokens < 1:
            raise ValueError(f"mean_tokens must be at least 1, not {mean_tokens}")
        digest = hashlib.blake2b(name, digest_size=16, salt=(seed & _MASK).to_bytes(8, "little")).digest()
        self._start = int.from_bytes(digest[:8], "little")
        self._vocabulary = vocabulary
        self._count = len(vocabulary)
        self._eos = eos_token_id
        self._last = -1
        """Index of the end-of-sequence token; negative = none."""
        if eos_token_id is not None and not ignore_eos:
            uniform = (int.from_bytes(digest[8:], "little") + 1) / 2**64  # above 0, up to 1
            self._last = max(_geometric(uniform, mean_tokens) - 1, min_tokens)

    def token(self, index: int) -> int | None:
        """Id of the `index`-th token, in any order: O(1)."""
        if index == self._last:
            return self._eos
        return self._vocabulary[_mix((self._start + index * _GOLDEN) & _MASK) % self._count]


def _geometric(uniform: float, mean: float) -> int:
    """1, 2, 3, ... with the given mean, by inversion of a number above 0 and up to 1."""
    return 1 + int(math.log(uniform) / math.log1p(-1 / mean)) if mean > 1 else 1
