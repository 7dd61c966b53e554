"""The configuration of one emulated engine."""

from __future__ import annotations

from dataclasses import dataclass


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
        if self.max_model_len > self.blocks * self.block_size:
            raise EngineConfigError(
                f"max_model_len ({self.max_model_len}) tokens do not fit into {self.blocks} blocks of "
                f"{self.block_size} tokens; lower it to {self.blocks * self.block_size} or give the cache "
                f"{-(-self.max_model_len // self.block_size)} blocks"
            )
