"""Counters of one engine, as vLLM counts (rule 16)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from worker.emulator.engine.request import FinishReason


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made. Read them at any time; nothing has to be drained."""

    prefix_cache_queries: int = 0
    """Prompt tokens looked up, at first admission."""
    prefix_cache_hits: int = 0
    """Of those, tokens found."""
    prefilled: int = 0
    """Requests that reached their first token."""
    prompt_tokens: int = 0
    """Of these."""
    cached_prompt_tokens: int = 0
    """Of those, tokens that came from the cache."""
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    """Sum of the steps' durations."""
    step_tokens: Counter[int] = field(default_factory=Counter)
    """How many steps computed so many tokens; has as many entries as different sizes occurred."""
    finished: Counter[FinishReason] = field(default_factory=Counter)
