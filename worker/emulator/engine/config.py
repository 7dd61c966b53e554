"""The configuration of one emulated engine."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.feed import FULL_ATTENTION, SLIDING_WINDOW, CacheGroup

MAX_GROUPS = 255
"""Sliding groups: the number of one is a byte of its keys."""


class EngineConfigError(ValueError):
    """The configuration contradicts itself; the message says what to change."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine. Raises `EngineConfigError` for what vLLM also refuses at its start."""

    blocks: int
    """KV blocks, without the null block (vLLM rule 5)."""
    max_num_batched_tokens: int
    """Tokens that one step computes at most."""
    max_num_seqs: int
    """Sequences that run at the same time at most."""
    max_model_len: int
    """Longest prompt plus output, in tokens."""
    block_size: int = 16
    """Tokens of one block."""
    eos_token_id: int | None = None
    enable_prefix_caching: bool = True
    max_loras: int = 0
    """LoRA adapters whose sequences may run at the same time; 0: any number."""
    cpu_blocks: int = 0
    """Blocks that the CPU tier holds; 0: there is none."""
    cpu_block_seconds: float = 0.0
    """Seconds that loading one block from the CPU takes."""
    sliding_window: int = 0
    """Tokens that the layers of the sliding groups look back, the token itself included; 0: there are none."""
    sliding_groups: int = 0
    """KV-cache groups with a sliding window, beside the one of full attention."""

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """The cache's groups, as its feed states them: none if there is just one of full attention."""
        if not self.sliding_groups:
            return ()
        sliding = CacheGroup(SLIDING_WINDOW, self.block_size, self.sliding_window)
        return (CacheGroup(FULL_ATTENTION, self.block_size), *[sliding] * self.sliding_groups)

    @property
    def sliding_blocks_per_request(self) -> int:
        """Most blocks of a sliding group that one request takes: those of the window and of one step's tokens, and one
        more because a window need not begin with a block (vLLM: `SlidingWindowSpec`)."""
        tokens = min(self.sliding_window - 1 + self.max_num_batched_tokens, self.max_model_len)
        return -(-tokens // self.block_size) + 1

    def __post_init__(self) -> None:
        for name in ("blocks", "max_num_batched_tokens", "max_num_seqs", "block_size"):
            if getattr(self, name) < 1:
                raise EngineConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.cpu_blocks < 0 or self.cpu_block_seconds < 0:
            raise EngineConfigError("cpu_blocks and cpu_block_seconds must not be negative")
        if self.cpu_blocks and not self.enable_prefix_caching:
            raise EngineConfigError("blocks on the CPU are found by their prefixes: cpu_blocks needs prefix caching")
        if self.max_model_len < 2:
            raise EngineConfigError(
                f"max_model_len must be at least 2 (a prompt and an output), not {self.max_model_len}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise EngineConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running sequence needs one token a step"
            )
        if (self.sliding_window < 1) != (self.sliding_groups < 1):
            raise EngineConfigError("sliding_window and sliding_groups are set both or neither")
        if self.sliding_groups > MAX_GROUPS:
            raise EngineConfigError(f"at most {MAX_GROUPS} sliding_groups, not {self.sliding_groups}")
        if self.sliding_groups and self.cpu_blocks:
            raise EngineConfigError("a CPU tier beside sliding windows is not emulated: leave out one of them")
        longest = -(-self.max_model_len // self.block_size)
        needed = longest + self.sliding_groups * min(longest, self.sliding_blocks_per_request)
        if self.sliding_groups and needed > self.blocks:
            raise EngineConfigError(
                f"a request of max_model_len ({self.max_model_len}) tokens takes {needed} blocks of {self.block_size} "
                f"tokens in {1 + self.sliding_groups} groups, but the cache has {self.blocks}; lower max_model_len"
            )
        if self.max_model_len > self.blocks * self.block_size:
            raise EngineConfigError(
                f"max_model_len ({self.max_model_len}) tokens do not fit into {self.blocks} blocks of "
                f"{self.block_size} tokens; lower it to {self.blocks * self.block_size} or give the cache "
                f"{-(-self.max_model_len // self.block_size)} blocks"
            )
