"""Keys of KV-cache blocks, which the worker and the router compute in the same way.

Key of a full block = the first 16 bytes of SHA-256 over a header (cache salt, adapter) and the token ids as
little-endian uint32 from the start of the prompt to the END of that block. A key therefore names a whole
prefix: "who has this prefix" is one dictionary lookup, and the key at any depth can be computed without
computing those of the blocks in between (`PrefixKeys.key`). Only full blocks have keys.

The tokens that stand for an image are the same for all images of a size, so its identifier goes in where it begins
(`_with_image`): a key names the images of its prefix too. vLLM mixes it into each block that the image touches
(`_gen_mm_extra_hash_keys` in `v1/core/kv_cache_utils.py`), which separates the same prompts.

The chained hash that vLLM uses (vLLM rule 1) was rejected: it costs one digest a block even when a search
needs a handful of depths, and its seed differs between engines (rule 2).
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

KEY_SCHEME = "sha256-prefix-128"
"""Name of this scheme. A worker that states another one is refused for matching."""

KEY_BYTES = 16
BYTES_PER_TOKEN = 4
MAX_TOKEN_ID = 2**32 - 1

BlockKey = bytes
"""16 bytes; hexadecimal in JSON."""


class TokenIdError(ValueError):
    """A token id cannot be packed: it is not an integer between 0 and 2**32 - 1."""


@dataclass(frozen=True, slots=True)
class CacheScope:
    """What separates equal token prefixes from one another: blocks are shared only within one scope.

    `salt` is the request's `cache_salt` (a tenant's secret, say), `adapter` the LoRA adapter's name; both are
    empty for most requests. vLLM keeps the same two apart (vLLM rule 3).
    """

    salt: str = ""
    adapter: str = ""

    def header(self) -> bytes:
        """Bytes hashed before the first token. Lengths go first, so no two scopes share a header."""
        salt, adapter = self.salt.encode(), self.adapter.encode()
        return struct.pack("<II", len(salt), len(adapter)) + salt + adapter


DEFAULT_SCOPE = CacheScope()
_DEFAULT_START = hashlib.sha256(DEFAULT_SCOPE.header())
"""The state before the first block of most prompts. It is only ever copied."""


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, 4 bytes each. Raises `TokenIdError`."""
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError) as error:
        raise TokenIdError(f"token ids must be integers between 0 and {MAX_TOKEN_ID}: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


Image = tuple[int, str]
"""Where an image begins (the index of the first token that stands for it), and what identifies it."""

_IMAGE_MARK = 2**32 - 1


def _with_image(state: hashlib._Hash, identifier: str) -> hashlib._Hash:
    """The hash of a prefix after which an image begins: that of a mark, the prefix so far, and the image's identifier.
    The mark stands where a header has the length of its salt, which is never so large, so no prefix without the
    image has the same hash."""
    name = identifier.encode(errors="surrogatepass")
    return hashlib.sha256(struct.pack("<II", _IMAGE_MARK, len(name)) + state.digest() + name)


def _absorb(state: hashlib._Hash, packed_block: bytes | memoryview, images: Sequence[Image]) -> hashlib._Hash:
    """The hash after one more block, in which these images begin; `state` itself may change."""
    begin = 0
    for offset, identifier in images:
        state.update(packed_block[begin : offset * BYTES_PER_TOKEN])
        state, begin = _with_image(state, identifier), offset * BYTES_PER_TOKEN
    state.update(packed_block[begin:])
    return state


class PrefixHasher:
    """Keys of consecutive blocks of a sequence that grows: call `extend` with each full block in order.

    O(block size) for each block, whatever the length of the sequence so far.
    """

    __slots__ = ("_digest",)

    def __init__(self, scope: CacheScope = DEFAULT_SCOPE, after: PrefixState | None = None) -> None:
        """`after`: the hash of the blocks that come before, in this scope; None: there are none."""
        self._digest = hashlib.sha256(scope.header()) if after is None else after.copy()

    def extend(self, packed_block: bytes | memoryview, images: Sequence[Image] = ()) -> BlockKey:
        """Key of the block that ends with `packed_block` (the packed ids of exactly one block). `images` begin in it,
        in order."""
        if images:
            self._digest = _absorb(self._digest, packed_block, images)
        else:
            self._digest.update(packed_block)
        return self._digest.digest()[:KEY_BYTES]


PrefixState: TypeAlias = "hashlib._Hash"
"""The hash of a prefix so far. Treat it as a value: `prefix_extended` makes new ones."""


def prefix_start(scope: CacheScope = DEFAULT_SCOPE) -> PrefixState:
    """The state before a prompt's first block."""
    return hashlib.sha256(scope.header())


def prefix_extended(
    state: PrefixState, packed_block: bytes | memoryview, images: Sequence[Image] = ()
) -> tuple[PrefixState, BlockKey]:
    """The state after one more block, in which `images` begin, and that block's key. `state` stays as it is: other
    blocks may follow it too."""
    longer = state.copy()
    if images:
        longer = _absorb(longer, packed_block, images)
    else:
        longer.update(packed_block)
    return longer, longer.digest()[:KEY_BYTES]


class PrefixKeys:
    """Keys of one prompt's full blocks, each computed when it is first asked for.

    Hash states are kept at the depths already probed, so a galloping search (depths 1, 2, 4, ... and then a
    bisection) hashes little more than the part of the prompt below the deepest probe.
    """

    __slots__ = ("_block_bytes", "_computed", "_depths", "_keys", "_packed", "_states", "depth")

    def __init__(
        self, packed: bytes, block_size: int, scope: CacheScope = DEFAULT_SCOPE, images: Sequence[Image] = ()
    ) -> None:
        """`images`: in the order of the prompt. The keys of a prompt with images are computed at once."""
        self._packed = memoryview(packed)
        self._block_bytes = block_size * BYTES_PER_TOKEN
        self.depth = len(packed) // self._block_bytes
        """How many full blocks the prompt has, hence the deepest depth that has a key."""
        self._states = {0: _DEFAULT_START if scope is DEFAULT_SCOPE else hashlib.sha256(scope.header())}
        self._depths = [0]
        self._keys: dict[int, BlockKey] = {}
        self._computed: list[BlockKey] | None = None
        """Keys of all blocks, where `compute` was called."""
        if images:
            self._computed = list(_keys_with_images(self._packed, block_size, scope, images))

    @property
    def packed(self) -> memoryview:
        """The prompt, as `pack_tokens` packs it."""
        return self._packed

    def of(self, packed: bytes) -> PrefixKeys:
        """Keys of another prompt, with the same block size and scope."""
        other = PrefixKeys(packed, self._block_bytes // BYTES_PER_TOKEN)
        other._states = {0: self._states[0]}
        return other

    def key(self, depth: int) -> BlockKey:
        """Key of the prefix of `depth` full blocks, 1 <= depth <= self.depth."""
        if self._computed is not None and 1 <= depth <= self.depth:
            return self._computed[depth - 1]
        known = self._keys.get(depth)
        if known is not None:
            return known
        if not 1 <= depth <= self.depth:
            raise IndexError(f"depth {depth} is outside 1..{self.depth}")
        below = 0
        for at in self._depths:  # a dozen entries after a search: a scan beats a sorted container
            if below < at <= depth:
                below = at
        state = self._states[below].copy()
        state.update(self._packed[below * self._block_bytes : depth * self._block_bytes])
        self._states[depth] = state
        self._depths.append(depth)
        key = self._keys[depth] = state.digest()[:KEY_BYTES]
        return key

    def compute(self, checkpoint: Callable[[], None] = lambda: None) -> None:
        """Compute every key now, perhaps in another thread; `checkpoint` is called every 1,024 blocks and may raise."""
        if self._computed is not None:
            return
        keys: list[BlockKey] = []
        state, size = self._states[0].copy(), self._block_bytes
        update, digest, append = state.update, state.digest, keys.append
        for number, (block,) in enumerate(struct.iter_unpack(f"{size}s", self._packed[: self.depth * size]), 1):
            update(block)
            append(digest()[:KEY_BYTES])
            if number % 1024 == 0:
                checkpoint()
        self._states[self.depth] = state
        self._computed = keys

    def compute_with(self, known: KnownKeys) -> None:
        """The same as `compute`, but keys that are `known` from earlier prompts are not computed again."""
        if self._computed is not None:
            return
        keys: list[BlockKey] = []
        state, size, packed = self._states[0], self._block_bytes, self._packed
        length, end = RUN * size, self.depth * size
        at = 0
        while at + length <= end:
            after = state.copy()
            after.update(packed[at : at + length])
            last = after.digest()[:KEY_BYTES]
            run = known.run(last)
            if run is None:
                run = _keys_after(state.copy(), packed[at : at + length], size)
                known.add(last, run)
            keys += run
            state, at = after, at + length
        if at < end:
            after = state.copy()
            keys += _keys_after(after, packed[at:end], size)
            state = after
        self._states[self.depth] = state
        self._computed = keys

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._block_bytes // BYTES_PER_TOKEN

    def hasher(self) -> PrefixHasher:
        """Goes on after the last full block. Call it after `compute`, and not for a prompt with images."""
        return PrefixHasher(after=self._states[self.depth])

    def all(self, above: int = 0, stride: int = 1) -> list[BlockKey]:
        """Keys of every `stride`-th full block deeper than `above` (a multiple of `stride`), first block first:
        O(length of the prompt beyond it)."""
        if self._computed is not None:
            return self._computed[above + stride - 1 :: stride]
        return list(self.between(above, self.depth, stride))

    def between(self, above: int, end: int, stride: int = 1) -> Iterator[BlockKey]:
        """Keys of every `stride`-th block deeper than `above` (a multiple of `stride`) up to `end`, first block first,
        each hashed when it is reached."""
        if self._computed is not None:
            yield from self._computed[above + stride - 1 : end : stride]
            return
        if above:
            self.key(above)
        state = self._states[above].copy()
        size, packed = self._block_bytes * stride, self._packed
        for at in range(above * self._block_bytes + size, end * self._block_bytes + 1, size):
            state.update(packed[at - size : at])
            yield state.digest()[:KEY_BYTES]


RUN = 32
"""Blocks that are known together."""


class KnownKeys:
    """Keys of prompts, for one who computes those of many that begin alike: in runs of `RUN` blocks, found by the key
    of a run's last block, which names all that is in it and before it. The runs used least recently are dropped.

    Equal blocks then have the same key object, which dictionaries find faster and which takes memory once.
    """

    __slots__ = ("_limit", "_runs")

    def __init__(self, runs: int = 16_384) -> None:
        """`runs`: the most to keep, of which each takes 2 KB."""
        self._runs: OrderedDict[BlockKey, list[BlockKey]] = OrderedDict()
        self._limit = runs

    def run(self, last: BlockKey) -> list[BlockKey] | None:
        """The run that ends with this key; it must not be changed."""
        found = self._runs.get(last)
        if found is not None:
            self._runs.move_to_end(last)
        return found

    def add(self, last: BlockKey, run: list[BlockKey]) -> None:
        """Keep a run."""
        self._runs[last] = run
        if len(self._runs) > self._limit:
            self._runs.popitem(last=False)


def _keys_after(state: hashlib._Hash, packed: memoryview, size: int) -> list[BlockKey]:
    """The keys of blocks of `size` bytes that follow a prefix, whose hash becomes that of the last of them."""
    update, digest = state.update, state.digest
    keys: list[BlockKey] = []
    for (block,) in struct.iter_unpack(f"{size}s", packed):
        update(block)
        keys.append(digest()[:KEY_BYTES])
    return keys


def _keys_with_images(
    packed: memoryview, block_size: int, scope: CacheScope, images: Sequence[Image]
) -> Iterator[BlockKey]:
    hasher, size, coming = PrefixHasher(scope), block_size * BYTES_PER_TOKEN, list(reversed(images))
    for block in range(len(packed) // size):
        begin, within = block * block_size, []
        while coming and coming[-1][0] < begin + block_size:
            position, identifier = coming.pop()
            within.append((position - begin, identifier))
        yield hasher.extend(packed[block * size : (block + 1) * size], within)


def block_keys(
    tokens: Sequence[int], block_size: int, scope: CacheScope = DEFAULT_SCOPE, images: Sequence[Image] = ()
) -> list[BlockKey]:
    """Keys of the full blocks of `tokens`, first block first; a last partial block has none."""
    return PrefixKeys(pack_tokens(tokens), block_size, scope, images).all()
