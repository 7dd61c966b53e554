"""How much of a prompt a cache of several groups can serve.

The rule is vLLM's (`v1/core/kv_cache_coordinator.py:HybridKVCacheCoordinator.find_longest_cache_hit`, and
`v1/core/single_type_kv_cache_manager.py:SlidingWindowManager`): the greatest length that every group can serve, where
a group of full attention needs all blocks of that length, and a group with a sliding window of w tokens needs the
blocks of the w - 1 tokens before its end, in whole blocks (fewer if the prompt begins within them). The length is a
multiple of every group's block size. A cache may also consist of sliding groups alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvcache.feed import SLIDING_WINDOW, CacheGroup
from kvcache.keys import BlockKey, PrefixKeys


class Group(NamedTuple):
    """The shape of one group, in blocks of the router."""

    stride: int
    """Length of a block of the group."""
    window: int
    """How much before its end a prefix needs: a multiple of the stride. 0: all of it."""


def shapes(groups: Sequence[CacheGroup], block_size: int) -> tuple[Group, ...]:
    """The groups in blocks of the router, of `block_size` tokens. Block sizes must be multiples of it."""
    return tuple(
        Group(group.block_size // block_size, _needed(group) * group.block_size // block_size) for group in groups
    )


def _needed(group: CacheGroup) -> int:
    return -(-(group.window - 1) // group.block_size) if group.attention == SLIDING_WINDOW else 0


def longest_served(
    keys: PrefixKeys, limit: int, step: int, groups: Sequence[Group], holds: Sequence[Callable[[BlockKey], bool]]
) -> int:
    """The longest prefix of the prompt, up to `limit` blocks, that all groups can serve: a multiple of `step`, which is
    one of every stride. `holds[i]` says whether group i holds the block of a key.

    O(log limit) lookups for each group of full attention. A window that lacks a block excludes every length whose
    window includes that block, so a search that finds nothing looks at one block in each window's length.
    """
    depth = limit // step * step
    for group, held in zip(groups, holds, strict=True):
        if not group.window:
            depth = _prefix(keys, depth, group.stride, held) // step * step
    windows = [(group, held) for group, held in zip(groups, holds, strict=True) if group.window]
    while depth:
        missing = min((_missing(keys, depth, group, held) for group, held in windows), default=depth + 1)
        if missing > depth:
            return depth
        depth = (missing - 1) // step * step
        keys.compute()  # the search will jump back and forth
    return 0


def _prefix(keys: PrefixKeys, limit: int, stride: int, held: Callable[[BlockKey], bool]) -> int:
    """How many leading blocks, up to `limit`, a group holds whose cache is prefix-closed."""
    low, high = 0, limit // stride + 1
    probe = high - 1
    while high - low > 1:
        if held(keys.key(probe * stride)):
            low = probe
        else:
            high = probe
        probe = (low + high) // 2
    return low * stride


def _missing(keys: PrefixKeys, depth: int, group: Group, held: Callable[[BlockKey], bool]) -> int:
    """The depth of the first block that the group lacks in the window before `depth`; `depth` + 1 if it lacks none."""
    at = max(0, depth - group.window)
    for key in keys.between(at, depth, group.stride):
        at += group.stride
        if not held(key):
            return at
    return depth + 1
