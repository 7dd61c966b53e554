"""The token ids that an engine would see for each request of a workload, and the hit rate that they allow at most.

The ceiling is that of one cache as large as all workers' caches together, the pooled cache. No router can beat it by
much: it is what the prompts share, limited only by the memory that there is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.workloads import CHAT, MESSAGES, TimedRequest, TokenIds, Workload
from kvcache.keys import BlockKey, CacheScope, PrefixKeys, pack_tokens
from kvcache.prompts import chat_request_prompt, completion_prompts, messages_chat_fields, request_scope
from kvcache.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request and its prompt, as the router and the worker tokenise it."""

    request: TimedRequest
    tokens: Sequence[int]
    scope: CacheScope


def prompts(workload: Workload, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Every request of the workload with its tokens. Raises `PromptError` for a prompt that a worker would refuse."""
    for request in workload.requests():
        tokens: Sequence[int]
        if request.path == CHAT:
            tokens = chat_request_prompt(request.body, tokenizer)
        elif request.path == MESSAGES:
            tokens = chat_request_prompt(messages_chat_fields(request.body, tokenizer), tokenizer)
        elif request.prompt_tokens is not None:
            tokens = _known_ids(request.body["prompt"], tokenizer)
        else:
            (tokens,) = completion_prompts(request.body["prompt"], tokenizer)
        yield Prompt(request, tokens, request_scope(request.body, request.body.get("model", "")))


def _known_ids(ids: TokenIds, tokenizer: Tokenizer) -> Sequence[int]:
    """The same ids, if the vocabulary has all of them. Raises `PromptError`, as for ids that are sent in a request."""
    if not ids or np.frombuffer(ids, np.uint32).max() >= tokenizer.vocab_size:
        completion_prompts(ids.tolist(), tokenizer)
    return ids


class PooledCache:
    """An LRU prefix cache of `capacity` blocks, with the rules of the engines. O(1) a block.

    A hit is the longest run of cached blocks that leaves the last token to compute (vLLM rule 8), blocks are there from
    the moment they are scheduled (rule 6), and the tail of a prompt is evicted before its head (rule 10). Blocks that
    generated tokens would fill are left out, in favour of the ceiling.
    """

    __slots__ = ("_blocks", "_capacity")

    def __init__(self, capacity: int) -> None:
        self._blocks: OrderedDict[BlockKey, None] = OrderedDict()
        self._capacity = capacity

    def admit(self, keys: Sequence[BlockKey], reusable: int) -> int:
        """How many leading blocks of a prompt are found, at most `reusable`. Afterwards all its blocks are held, its
        first block as the most recently used."""
        blocks = self._blocks
        found = 0
        while found < reusable and keys[found] in blocks:
            found += 1
        for key in reversed(keys):
            blocks[key] = None
            blocks.move_to_end(key)
        while len(blocks) > self._capacity:
            blocks.popitem(last=False)
        return found

    def held(self) -> frozenset[BlockKey]:
        """The blocks that are in the cache now."""
        return frozenset(self._blocks)


def pooled_hit_rate(
    prompts: Iterable[Prompt],
    capacity: int,
    block_size: int,
    counts: Callable[[TimedRequest], bool] = lambda request: True,
) -> float:
    """Cached over all prompt tokens, if the prompts come one after the other; `capacity` in blocks. Requests that do
    not count (those of a warm-up) fill the cache and are left out of the rate."""
    cache = PooledCache(capacity)
    hits = total = 0
    for prompt in prompts:
        keys = PrefixKeys(pack_tokens(prompt.tokens), block_size, prompt.scope).all()
        found = cache.admit(keys, (len(prompt.tokens) - 1) // block_size) * block_size
        if counts(prompt.request):
            hits += found
            total += len(prompt.tokens)
    return hits / total if total else 0.0
