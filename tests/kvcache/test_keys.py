"""Block keys.

Covers: what a key names, and that every way to compute one agrees with a definition written out here. Not covered:
vLLM's own block hashes, which are not used.
"""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.keys import (
    BYTES_PER_TOKEN,
    DEFAULT_SCOPE,
    KEY_BYTES,
    RUN,
    CacheScope,
    KnownKeys,
    PrefixHasher,
    PrefixKeys,
    TokenIdError,
    block_keys,
    pack_tokens,
    prefix_extended,
    prefix_start,
)

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=120)
block_sizes = st.integers(1, 9)
scopes = st.builds(CacheScope, salt=st.text(max_size=5), adapter=st.text(max_size=5))


def defined_keys(tokens: list[int], block_size: int, scope: CacheScope) -> list[bytes]:
    """The definition, word for word: 16 bytes of SHA-256 over (salt, adapter, all ids up to the block's end)."""
    salt, adapter = scope.salt.encode(), scope.adapter.encode()
    header = struct.pack("<II", len(salt), len(adapter)) + salt + adapter
    ends = range(block_size, len(tokens) + 1, block_size)
    return [hashlib.sha256(header + struct.pack(f"<{end}I", *tokens[:end])).digest()[:16] for end in ends]


@given(token_ids, block_sizes, scopes)
def test_keys_are_those_of_the_definition(tokens: list[int], block_size: int, scope: CacheScope) -> None:
    assert block_keys(tokens, block_size, scope) == defined_keys(tokens, block_size, scope)


@given(token_ids, block_sizes, scopes, st.data())
def test_probing_in_any_order_gives_the_same_keys(
    tokens: list[int], block_size: int, scope: CacheScope, data: st.DataObject
) -> None:
    wanted = defined_keys(tokens, block_size, scope)
    keys = PrefixKeys(pack_tokens(tokens), block_size, scope)
    assert keys.depth == len(wanted)
    if wanted:
        depths = data.draw(st.lists(st.integers(1, len(wanted))))
        assert [keys.key(depth) for depth in depths] == [wanted[depth - 1] for depth in depths]
    assert keys.all() == wanted
    above = data.draw(st.integers(0, len(wanted)))
    assert keys.all(above) == wanted[above:]
    stride = data.draw(st.integers(1, 5))
    above -= above % stride
    assert keys.all(above, stride) == wanted[above + stride - 1 :: stride]
    keys.compute(lambda: None)
    assert keys.all(above, stride) == wanted[above + stride - 1 :: stride]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3 * RUN), st.integers(0, 2 * RUN), scopes), max_size=4), st.integers(1, 3))
def test_keys_known_from_other_prompts_are_those_of_the_definition(
    prompts: list[tuple[int, int, CacheScope]], block_size: int
) -> None:
    known = KnownKeys(runs=3)
    for shared, own, scope in prompts:
        tokens = [7] * shared * block_size + list(range(own * block_size + 1))
        keys = PrefixKeys(pack_tokens(tokens), block_size, scope)
        keys.compute_with(known)
        wanted = defined_keys(tokens, block_size, scope)
        assert keys.all() == wanted
        more = pack_tokens([9] * block_size)
        following = [*tokens[: keys.depth * block_size], *[9] * block_size]
        assert keys.hasher().extend(more) == defined_keys(following, block_size, scope)[-1]


@given(token_ids, block_sizes, st.integers(1, 5), scopes)
def test_longer_blocks_have_the_keys_of_the_shorter_ones_that_end_with_them(
    tokens: list[int], block_size: int, stride: int, scope: CacheScope
) -> None:
    shorter = block_keys(tokens, block_size, scope)
    assert block_keys(tokens, block_size * stride, scope) == shorter[stride - 1 :: stride]


@given(token_ids, block_sizes, scopes)
def test_a_growing_sequence_gets_the_same_keys(tokens: list[int], block_size: int, scope: CacheScope) -> None:
    hasher, packed, size = PrefixHasher(scope), pack_tokens(tokens), block_size * BYTES_PER_TOKEN
    ends = range(size, len(packed) + 1, size)
    grown = [hasher.extend(packed[end - size : end]) for end in ends]
    assert grown == block_keys(tokens, block_size, scope)


@given(token_ids, token_ids, block_sizes)
def test_prompts_share_keys_exactly_as_deep_as_they_share_blocks(
    first: list[int], second: list[int], block_size: int
) -> None:
    pairs = list(zip(block_keys(first, block_size), block_keys(second, block_size), strict=False))
    for depth, (one, other) in enumerate(pairs, 1):
        assert (one == other) == (first[: depth * block_size] == second[: depth * block_size])


@given(scopes, scopes)
def test_scopes_share_a_header_only_when_equal(one: CacheScope, other: CacheScope) -> None:
    assert (one.header() == other.header()) == (one == other)


def test_salt_and_adapter_are_not_interchangeable() -> None:
    tokens = list(range(16))
    keys = {block_keys(tokens, 16, scope)[0] for scope in (DEFAULT_SCOPE, CacheScope("a"), CacheScope(adapter="a"))}
    assert len(keys) == 3
    assert all(len(key) == KEY_BYTES for key in keys)


def test_a_partial_block_has_no_key() -> None:
    assert block_keys([1] * 15, 16) == []
    assert len(block_keys([1] * 33, 16)) == 2


@pytest.mark.parametrize("depth", [0, 3, -1])
def test_a_depth_outside_the_prompt_is_refused(depth: int) -> None:
    with pytest.raises(IndexError, match=r"outside 1\.\.2"):
        PrefixKeys(pack_tokens([1] * 32), 16).key(depth)


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param([-1], id="negative"),
        pytest.param([2**32], id="too large"),
        pytest.param(["1"], id="text"),
        pytest.param([None], id="none"),
        pytest.param([1.5], id="fraction"),
    ],
)
def test_what_is_no_token_id_is_refused(tokens: list[int]) -> None:
    with pytest.raises(TokenIdError, match="between 0 and 4294967295"):
        pack_tokens(tokens)


IMAGES = st.lists(st.tuples(st.integers(0, 60), st.text(max_size=3)), max_size=3, unique_by=lambda image: image[0]).map(
    sorted
)


@given(token_ids, token_ids, IMAGES, IMAGES, block_sizes, scopes)
def test_prompts_share_keys_exactly_as_deep_as_they_share_tokens_and_images(
    tokens: list[int],
    others: list[int],
    images: list[tuple[int, str]],
    other_images: list[tuple[int, str]],
    block_size: int,
    scope: CacheScope,
) -> None:
    """Also where one prompt goes on from a prefix of the other."""
    others = tokens[: len(others)] + others
    one = block_keys(tokens, block_size, scope, [image for image in images if image[0] < len(tokens)])
    other = block_keys(others, block_size, scope, [image for image in other_images if image[0] < len(others)])
    for depth, (a, b) in enumerate(zip(one, other, strict=False), 1):
        end = depth * block_size
        within = [image for image in images if image[0] < end] == [image for image in other_images if image[0] < end]
        assert (a == b) == (tokens[:end] == others[:end] and within)


@given(token_ids, IMAGES, block_sizes, st.integers(1, 3), scopes)
def test_every_way_to_keys_with_images_gives_the_same(
    tokens: list[int], images: list[tuple[int, str]], block_size: int, stride: int, scope: CacheScope
) -> None:
    images = [image for image in images if image[0] < len(tokens)]
    keys = block_keys(tokens, block_size, scope, images)
    assert block_keys(tokens, block_size * stride, scope, images) == keys[stride - 1 :: stride]
    packed, state, size = pack_tokens(tokens), prefix_start(scope), block_size * BYTES_PER_TOKEN
    search = PrefixKeys(packed, block_size, scope, images)
    for block, key in enumerate(keys):
        begin = block * block_size
        here = [(at - begin, name) for at, name in images if begin <= at < begin + block_size]
        state, extended = prefix_extended(state, packed[block * size : (block + 1) * size], here)
        assert extended == key == search.key(block + 1)
