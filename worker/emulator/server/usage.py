"""Token counts of an answer, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker.emulator.server.generation import Choice


def totals(choices: Sequence[Choice], n: int) -> tuple[int, int]:
    """(prompt, completion) tokens. A prompt counts once, however many of its `n` choices there are."""
    return sum(choice.prompt_tokens for choice in choices[::n]), sum(len(choice.tokens) for choice in choices)


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The counts, in vLLM's order."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def created_cache_tokens(choice: Choice, block_size: int) -> int:
    """Prompt tokens whose blocks were new to the cache: those of full blocks that were not cached."""
    return choice.prompt_tokens // block_size * block_size - choice.cached_tokens
