"""Model geometry, engine latency and the named profiles that tie them to a GPU.

`docs/profiles.md` shows the arithmetic of every profile; tests assert it. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

GIB = 2**30


class UnknownProfileError(ValueError):
    """No profile has this name; the message lists those that exist."""


class LatencyError(ValueError):
    """A latency model is not written as `parse_latency` reads it; the message says how."""


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """The figures of a transformer that decide how many bytes one token's keys and values take."""

    layers: int
    """Those of full attention."""
    kv_heads: int
    head_size: int
    dtype_bytes: int = 2
    sliding_layers: int = 0
    """Further layers, which look back `sliding_window` tokens; no fewer than `layers`, if there are any."""
    sliding_window: int = 0

    @property
    def sliding_groups(self) -> int:
        """KV-cache groups of the sliding layers: as many layers in each as there are of full attention (vLLM:
        `_get_kv_cache_groups_uniform_page_size`)."""
        return -(-self.sliding_layers // self.layers)

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of one block of `block_size` tokens, in any group: 2 (K, V) x layers of a group x heads x head size x
        dtype x tokens."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.dtype_bytes * block_size


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """How long an engine step takes. Seconds.

    A prefill costs `prefill_base + prefill_block x blocks computed` (blocks of `block_size` tokens, whatever the block
    size of the cache), or `prefill_cached` when every full block of the prompt that may be reused is cached. A decode
    step costs `decode`, which reads the weights once for all sequences, `decode_sequence` for each sequence, and
    `decode_token` for each token of context of any of them, whose keys and values are read. A step that does both takes
    the longer of the two: the weights are read once for the prefill chunk and the decoding sequences ride along.
    """

    prefill_base: float
    prefill_block: float
    prefill_cached: float
    decode: float
    decode_sequence: float = 0.0
    decode_token: float = 0.0
    block_size: int = 16
    """Tokens of the block that `prefill_block` is about."""

    def decode_step(self, sequences: int, context: float) -> float:
        """Seconds of a step that decodes `sequences` whose tokens so far, all together, are `context`."""
        return self.decode + self.decode_sequence * sequences + self.decode_token * context

    def prefill(self, blocks: int) -> float:
        """Seconds of an unloaded prefill that computes `blocks` blocks; 0 means that all is cached."""
        return self.prefill_base + self.prefill_block * blocks if blocks else self.prefill_cached

    def with_times(self, times: Mapping[str, float]) -> LatencyModel:
        """The same with these of `LATENCY_TIMES` instead."""
        return replace(self, **times)  # type: ignore[arg-type]

    def scaled(self, speed: float) -> LatencyModel:
        """The same engine `speed` times as fast."""
        return LatencyModel(
            prefill_base=self.prefill_base / speed,
            prefill_block=self.prefill_block / speed,
            prefill_cached=self.prefill_cached / speed,
            decode=self.decode / speed,
            decode_sequence=self.decode_sequence / speed,
            decode_token=self.decode_token / speed,
            block_size=self.block_size,
        )


LATENCY_TIMES = tuple(each.name for each in fields(LatencyModel) if each.name != "block_size")
"""The times of a latency model."""


def parse_latency(text: str, start: LatencyModel) -> LatencyModel:
    """`start` with the times that `text` gives: `prefill-block=0.0006,decode=0.007`, seconds, in any order. Raises
    `LatencyError`."""
    times: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if name not in LATENCY_TIMES or not 0.0 <= seconds < math.inf:
            known = ", ".join(LATENCY_TIMES).replace("_", "-")
            raise LatencyError(f"{part!r:.80} is no time of a latency model: write NAME=SECONDS, with one of {known}")
        times[name] = seconds
    return start.with_times(times)


def format_latency(times: Mapping[str, float]) -> str:
    """Inverse of `parse_latency` for these times."""
    return ",".join(f"{name.replace('_', '-')}={seconds!r}" for name, seconds in times.items())


def blocks_to_compute(prompt_tokens: int, cached_tokens: int, block_size: int, unit: int = 0) -> int:
    """Blocks a prefill computes, partial last block included; 0 when all that may be cached is cached.

    `block_size` is that of the cache; blocks of `unit` tokens are counted (0: those of the cache). The last token of a
    prompt is always recomputed (vLLM rule 8), so "all is cached" means that the hit covers every full block below the
    last token (and that there is a hit: a prompt of one block has none).
    """
    if cached_tokens and cached_tokens >= (prompt_tokens - 1) // block_size * block_size:
        return 0
    unit = unit or block_size
    return -(-prompt_tokens // unit) - cached_tokens // unit


def longest_request(blocks: int, block_size: int, window: int, sliding_groups: int, step_tokens: int) -> int:
    """Tokens of the longest request that a cache of so many blocks can run: it takes blocks for all of them in one
    group and, in each sliding group, for its window and the tokens of one step."""
    if sliding_groups:
        sliding = -(-(window - 1 + step_tokens) // block_size) + 1
        blocks = max(blocks // (1 + sliding_groups), blocks - sliding_groups * sliding)
    return blocks * block_size


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one GPU: what fits, how fast it runs and how it is scheduled."""

    name: str
    model: str
    """Hugging Face id of the model the figures belong to."""
    geometry: ModelGeometry
    gpu_memory: int
    """Bytes the engine may use: the GPU's memory times its utilisation limit."""
    weights: int
    overhead: int
    """Bytes of activations, CUDA graphs and context."""
    latency: LatencyModel
    host_bandwidth: float
    """Bytes a second at which blocks are copied from the host's memory to the GPU."""
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int

    def num_gpu_blocks(self, block_size: int) -> int:
        """Physical blocks: what weights and overhead leave, in whole blocks. Block 0 is the null block."""
        return (self.gpu_memory - self.weights - self.overhead) // self.geometry.bytes_per_block(block_size)

    def blocks(self, block_size: int) -> int:
        """Blocks that can hold a prompt: all but the null block (vLLM rule 5)."""
        return self.num_gpu_blocks(block_size) - 1

    def longest_request(self, blocks: int, block_size: int) -> int:
        """Tokens of the longest request that a cache of so many blocks can run."""
        geometry = self.geometry
        return longest_request(
            blocks, block_size, geometry.sliding_window, geometry.sliding_groups, self.max_num_batched_tokens
        )

    def blocks_of(self, tokens: int, block_size: int) -> int:
        """Blocks that a request of so many tokens takes at most, in all groups."""
        blocks, geometry = -(-tokens // block_size), self.geometry
        sliding = -(-(geometry.sliding_window - 1 + self.max_num_batched_tokens) // block_size) + 1
        return blocks + geometry.sliding_groups * min(blocks, sliding)

    def load_seconds(self, block_size: int, bandwidth: float | None = None) -> float:
        """Seconds that loading one block from the host's memory takes, at this bandwidth instead of the profile's."""
        return self.geometry.bytes_per_block(block_size) / (bandwidth or self.host_bandwidth)


_MS = 1e-3
_PCIE_4 = 25.2e9
_PCIE_5 = 50.4e9
"""80 % of the bytes a second that 16 lanes of this generation carry in one direction."""

_LLAMA_2_13B_A100 = Profile(
    name="llama-2-13b-a100-40gb",
    model="meta-llama/Llama-2-13b-hf",
    geometry=ModelGeometry(layers=40, kv_heads=40, head_size=128),
    gpu_memory=40 * GIB,
    weights=26 * GIB,
    overhead=round(2.7 * GIB),
    latency=LatencyModel(5.0 * _MS, 2.5 * _MS, 0.5 * _MS, 15.0 * _MS, 0.156 * _MS, 0.62e-3 * _MS),
    host_bandwidth=_PCIE_4,
    max_model_len=4096,
    max_num_batched_tokens=2048,
    max_num_seqs=256,
)

_LLAMA_3_1_8B_H100 = Profile(
    name="llama-3.1-8b-h100-80gb",
    model="meta-llama/Llama-3.1-8B-Instruct",
    geometry=ModelGeometry(layers=32, kv_heads=8, head_size=128),
    gpu_memory=round(79.6 * 0.92 * GIB),
    weights=round(14.96 * GIB),
    overhead=round(3.0 * GIB),
    latency=LatencyModel(4.0 * _MS, 0.58 * _MS, 0.5 * _MS, 6.85 * _MS, 0.036 * _MS, 0.056e-3 * _MS),
    host_bandwidth=_PCIE_5,
    max_model_len=131072,
    max_num_batched_tokens=8192,
    max_num_seqs=1024,
)

_LLAMA_3_1_8B_L4 = Profile(
    name="llama-3.1-8b-l4-24gb",
    model="meta-llama/Llama-3.1-8B-Instruct",
    geometry=ModelGeometry(layers=32, kv_heads=8, head_size=128),
    gpu_memory=round(22.5 * 0.92 * GIB),
    weights=round(14.96 * GIB),
    overhead=round(1.5 * GIB),
    latency=LatencyModel(6.0 * _MS, 4.25 * _MS, 0.5 * _MS, 63.0 * _MS, 0.266 * _MS, 0.514e-3 * _MS),
    host_bandwidth=_PCIE_4,
    max_model_len=32768,
    max_num_batched_tokens=2048,
    max_num_seqs=256,
)

_GPT_OSS_20B_H100 = Profile(
    name="gpt-oss-20b-h100-80gb",
    model="openai/gpt-oss-20b",
    geometry=ModelGeometry(layers=12, kv_heads=8, head_size=64, sliding_layers=12, sliding_window=128),
    gpu_memory=round(79.6 * 0.92 * GIB),
    weights=round(12.82 * GIB),
    overhead=round(3.0 * GIB),
    latency=LatencyModel(4.0 * _MS, 0.26 * _MS, 0.5 * _MS, 5.87 * _MS, 0.016 * _MS, 0.0105e-3 * _MS),
    host_bandwidth=_PCIE_5,
    max_model_len=131072,
    max_num_batched_tokens=8192,
    max_num_seqs=1024,
)

PROFILES: Mapping[str, Profile] = {
    p.name: p for p in (_LLAMA_2_13B_A100, _LLAMA_3_1_8B_H100, _LLAMA_3_1_8B_L4, _GPT_OSS_20B_H100)
}
DEFAULT_PROFILE = _LLAMA_2_13B_A100.name


def profile(name: str) -> Profile:
    """The profile of this name. Raises `UnknownProfileError`."""
    try:
        return PROFILES[name]
    except KeyError:
        known = ", ".join(sorted(PROFILES))
        raise UnknownProfileError(f"unknown profile {name!r}; use one of: {known}") from None
