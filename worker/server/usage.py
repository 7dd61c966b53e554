"""Token counts of an answer, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker.server.generation import Choice


def totals(choices: Sequence[Choice], n: int) -> tuple[int, int, int]:
    """(prompt, completion, cached) tokens. A prompt counts once, however many of its `n` choices there are; what of
    it was cached is what its first choice found."""
    firsts = choices[::n]
    prompt = sum(choice.prompt_tokens for choice in firsts)
    completion = sum(len(choice.tokens) for choice in choices)
    return prompt, completion, sum(choice.cached_tokens for choice in firsts)


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The counts, in vLLM's order."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def created_cache_tokens(choices: Sequence[Choice], n: int, block_size: int) -> int:
    """Prompt tokens whose blocks were new to the cache: those of full blocks that were not cached."""
    return sum(choice.prompt_tokens // block_size * block_size - choice.cached_tokens for choice in choices[::n])
