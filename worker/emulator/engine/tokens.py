"""What identifies the blocks of one sequence: its tokens, and the scope in which they may be shared."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from kvcache.keys import BYTES_PER_TOKEN, BlockKey, CacheScope, Image, PrefixHasher, PrefixKeys, pack_tokens
from worker.emulator.engine.request import TokenSource


def ready(source: TokenSource, begin: int, end: int) -> list[int]:
    """Generated tokens of a source that has them ready."""
    token = source.token
    return [token(index) or 0 for index in range(begin, end)]


class SequenceTokens:
    """The tokens of a sequence that grows, and the keys of its full blocks, each computed when it is first needed.

    Events of the cache refer to it: what a block holds is only packed out where someone asks. Tokens are appended and
    never changed, so what is read of a full block stays true.
    """

    __slots__ = (
        "_block_bytes", "_hasher", "_keys", "_prompt", "_source", "block_size", "image_tokens", "images", "packed",
        "scope",
    )  # fmt: skip

    def __init__(
        self,
        tokens: Sequence[int],
        block_size: int,
        scope: CacheScope,
        images: Sequence[Image] = (),
        image_tokens: int = 0,
        keys: PrefixKeys | None = None,
        source: TokenSource | None = None,
    ) -> None:
        """`images` begin at these tokens, in order, and have `image_tokens` each. `keys`: all keys of `tokens`, if they
        are computed already; they do not matter if they are of another block size. `source`: has the tokens that
        follow, which are then not appended but read when they are needed."""
        self.images = images
        self.image_tokens = image_tokens
        self.block_size = block_size
        self.scope = scope
        known = keys if keys is not None and keys.block_size == block_size and not images else None
        self.packed = bytearray(pack_tokens(tokens) if known is None else known.packed)
        """Little-endian uint32. A generated token is appended to it."""
        self._prompt = len(tokens)
        self._source = source
        self._block_bytes = block_size * BYTES_PER_TOKEN
        self._hasher = PrefixHasher(scope) if known is None else known.hasher()
        self._keys: list[BlockKey] = [] if known is None else known.all()

    def keys(self, end: int) -> list[BlockKey]:
        """The keys of at least the first `end` blocks. The list must not be changed."""
        if len(self._keys) < end:
            for _ in self._hash(end):
                pass
        return self._keys

    def each_key(self, end: int) -> Iterator[BlockKey]:
        """The keys of the first `end` blocks, each hashed when it is reached."""
        return chain(islice(self._keys, end), self._hash(end))

    def of_blocks(self, first: int, end: int) -> list[int]:
        """The token ids of the blocks from index `first` up to `end`."""
        size = self._block_bytes
        tokens = array("I", bytes(self.packed[first * size : end * size]))
        return tokens.tolist()

    def images_in(self, block: int) -> list[Image]:
        """The images of which a part is in this block, each with where it begins, relative to the block."""
        begin, end = block * self.block_size, (block + 1) * self.block_size
        return [(at - begin, name) for at, name in self.images if at < end and at + self.image_tokens > begin]

    def _hash(self, end: int) -> Iterator[BlockKey]:
        """Extend the known keys to `end` blocks, one for each iteration."""
        size, packed, known, extend = self._block_bytes, self.packed, self._keys, self._hasher.extend
        if self._source is not None and len(packed) < end * size:
            begin = len(packed) // BYTES_PER_TOKEN - self._prompt
            packed += pack_tokens(ready(self._source, begin, end * self.block_size - self._prompt))
        for start in range(len(known) * size, end * size, size):
            images = [image for image in self.images_in(len(known)) if image[0] >= 0] if self.images else ()
            key = extend(bytes(packed[start : start + size]), images)
            known.append(key)
            yield key
