"""Which of a request's sequences its answer's `cached_tokens` is about.

One request may compute several: `n` of one prompt, or a list of prompts. vLLM 0.32 reports the figure of one of them
(measured): the last one's in a whole answer, the first one's in a stream. A later one finds in the cache what those
before it, of the same request, have just put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvcache.keys import CacheScope, PrefixKeys, pack_tokens
from router.core.decision import ReportedSequence


def reported_sequence(
    fields: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    keys: PrefixKeys,
    block_size: int,
    scope: CacheScope,
    *,
    streaming: bool,
) -> ReportedSequence | None:
    """None: it is the first prompt's, whose keys are `keys`, and nothing was computed just before it."""
    n = fields.get("n")
    siblings = isinstance(n, int) and n > 1
    if streaming or (len(prompts) == 1 and not siblings):
        return None
    *before, last = prompts
    reusable = max(len(last) - 1, 0) // block_size
    computed = len(last) if siblings else max(_common(prompt, last) for prompt in before)
    if len(prompts) > 1:
        keys = PrefixKeys(pack_tokens(last), block_size, scope)
    return ReportedSequence(keys, min(keys.depth, reusable), min(computed // block_size, reusable))


def reads_no_cache(fields: Mapping[str, Any], *, chat: bool) -> bool:
    """Whether the engine computes the whole prompt whatever it holds: its log-probabilities were asked for."""
    if fields.get("prompt_logprobs") is not None:
        return True
    asked = fields.get("top_logprobs", 0) if chat else fields.get("logprobs")
    return fields.get("echo") is True and asked is not None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
