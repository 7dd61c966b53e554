"""A cache of encodings: the beginning of a prompt that was seen before is not tokenised again.

Long text is cut into chunks at points where cutting provably changes no token, and each chunk's token ids are
kept. The cuts depend only on the text before them, so two prompts with a common beginning have their first
chunks in common.

Why the cuts are exact: byte-level BPE merges only inside the pieces that its regular expression finds. In every
expression of `CUT_SAFE_PATTERNS` the alternative that takes a letter or a digit takes no white space after it, so
a piece ends before a space that follows one, and a search that starts there finds what a search over the whole
text finds. (For a line break this holds after ASCII letters and digits whatever the Unicode version: an
unassigned letter counts as punctuation, and some expressions let punctuation take the line breaks after it.) Added
tokens are searched before that; those that hold no white space and do not look at their neighbours never span a
cut.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator

CHUNK_CHARS = 512
"""A chunk ends at the first cut after this many characters. The rest of a prompt, half a chunk on average, is always
tokenised. With larger chunks the rest takes most of the time, with smaller ones the handling of entries does."""

DEFAULT_CACHE_BYTES = 16 * 2**20
"""16 MiB hold about 9 million characters of English: every chunk costs its text and 4 bytes a token."""

ENTRY_BYTES = 300
"""Of an entry, beside its text and ids: two object headers, the dictionary's slot and its link."""

_CUT = re.compile(r"(?<=[^\W_]) |(?<=[A-Za-z0-9])\n")


def chunks(text: str, size: int = CHUNK_CHARS) -> Iterator[str]:
    """`text` in order, cut before a space or line break that follows a letter or a digit. The last is the rest."""
    start = 0
    for end in _cuts(text, size):
        yield text[start:end]
        start = end
    yield text[start:]


def _cuts(text: str, size: int) -> Iterator[int]:
    """Where `chunks` cuts."""
    start = 0
    while cut := _CUT.search(text, start + size):
        start = cut.start()
        yield start


class EncodingCache:
    """Least recently used chunks, at most `limit` bytes of them. Threads may share it."""

    def __init__(self, encode: Callable[[str], list[int]], limit: int = DEFAULT_CACHE_BYTES) -> None:
        self._encode = encode
        self._limit = limit
        self._entries: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0
        """What the entries take, an estimate."""
        self.hit_chars = 0
        """Characters that were answered from the cache."""

    def encode(self, text: str, progress: Callable[[int], None] | None = None) -> list[int]:
        """Token ids of `text`, equal to those of the plain `encode`.

        `progress` is told after every chunk how many ids there are so far; what it raises ends the work.
        """
        if len(text) <= CHUNK_CHARS:
            return self._encode(text)
        ids: list[int] = []
        start = 0
        for end in _cuts(text, CHUNK_CHARS):
            ids.extend(self._chunk(text[start:end]))
            start = end
            if progress is not None:
                progress(len(ids))
        # The rest ends where the text ends, not at a cut: a longer prompt would not find it.
        ids.extend(self._encode(text[start:]))
        return ids

    def _chunk(self, piece: str) -> array[int]:
        with self._lock:
            known = self._entries.get(piece)
            if known is not None:
                self._entries.move_to_end(piece)
                self.hit_chars += len(piece)
                return known
        ids = array("I", self._encode(piece))
        cost = _cost(piece, ids)
        if cost <= self._limit // 8:  # one huge chunk without a cut must not evict everything else
            with self._lock:
                self._remember(piece, ids, cost)
        return ids

    def _remember(self, piece: str, ids: array[int], cost: int) -> None:
        if piece in self._entries:  # another thread was faster
            return
        self._entries[piece] = ids
        self.bytes += cost
        while self.bytes > self._limit:
            self.bytes -= _cost(*self._entries.popitem(last=False))


def _cost(piece: str, ids: array[int]) -> int:
    width = 1 if piece.isascii() else 4
    return ENTRY_BYTES + width * len(piece) + ids.itemsize * len(ids)
