"""Profiles.

Covers: that the arithmetic of docs/profiles.md is the code's, figure by figure. Not covered: whether a real GPU is
as fast (docs/profiles.md says what was measured).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.profiles import (
    DEFAULT_PROFILE,
    GIB,
    PROFILES,
    LatencyModel,
    Profile,
    UnknownProfileError,
    blocks_to_compute,
    profile,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "profiles.md"
LLAMA_3_1_8B_PARAMETERS = 8_030_261_248
GPT_OSS_20B_ACTIVE_PARAMETERS = 3.6e9
GPT_OSS_20B_BYTES = 13.76e9
"""Of its checkpoint."""


def tables() -> list[dict[str, dict[str, float]]]:
    """The document's tables: column -> row -> figure."""
    found: list[dict[str, dict[str, float]]] = []
    columns: list[str] = []
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = cells[1:]
            found.append({column: {} for column in columns})
        elif not cells[0].startswith("---"):
            for column, cell in zip(columns, cells[1:], strict=True):
                found[-1][column][cells[0]] = float(cell.replace(",", ""))
    return found


FIGURES: dict[str, Callable[[Profile], float]] = {
    "layers": lambda p: p.geometry.layers,
    "KV heads": lambda p: p.geometry.kv_heads,
    "head size": lambda p: p.geometry.head_size,
    "bytes per value": lambda p: p.geometry.dtype_bytes,
    "sliding layers": lambda p: p.geometry.sliding_layers,
    "sliding window, tokens": lambda p: p.geometry.sliding_window,
    "sliding groups": lambda p: p.geometry.sliding_groups,
    "bytes a block": lambda p: p.geometry.bytes_per_block(16),
    "GPU memory, GiB": lambda p: round(p.gpu_memory / GIB, 2),
    "weights, GiB": lambda p: round(p.weights / GIB, 2),
    "overhead, GiB": lambda p: round(p.overhead / GIB, 2),
    "left for the cache, GiB": lambda p: round((p.gpu_memory - p.weights - p.overhead) / GIB, 2),
    "physical blocks": lambda p: p.num_gpu_blocks(16),
    "usable blocks": lambda p: p.blocks(16),
    "usable tokens": lambda p: p.blocks(16) * 16,
    "longest request, tokens": lambda p: p.max_model_len,
    "prefill base, ms": lambda p: round(1e3 * p.latency.prefill_base, 6),
    "prefill per block, ms": lambda p: round(1e3 * p.latency.prefill_block, 6),
    "prefill, all cached, ms": lambda p: round(1e3 * p.latency.prefill_cached, 6),
    "decode step, ms": lambda p: round(1e3 * p.latency.decode, 6),
    "and for each sequence, ms": lambda p: round(1e3 * p.latency.decode_sequence, 6),
    "and for 1,000 tokens of context, ms": lambda p: round(1e6 * p.latency.decode_token, 6),
    "load from the host, GB/s": lambda p: p.host_bandwidth / 1e9,
    "load of a block, ms": lambda p: round(1e3 * p.load_seconds(16), 4),
    "batched tokens a step": lambda p: p.max_num_batched_tokens,
    "sequences a step": lambda p: p.max_num_seqs,
}


def test_the_document_shows_every_profile_as_it_is() -> None:
    documented = tables()[0]
    assert documented == {name: {row: of(one) for row, of in FIGURES.items()} for name, one in PROFILES.items()}


@pytest.mark.parametrize(
    ("column", "name", "active", "read"),
    [
        ("H100 SXM", "llama-3.1-8b-h100-80gb", LLAMA_3_1_8B_PARAMETERS, 2 * LLAMA_3_1_8B_PARAMETERS),
        ("L4", "llama-3.1-8b-l4-24gb", LLAMA_3_1_8B_PARAMETERS, 2 * LLAMA_3_1_8B_PARAMETERS),
        ("H100 SXM, gpt-oss-20b", "gpt-oss-20b-h100-80gb", GPT_OSS_20B_ACTIVE_PARAMETERS, GPT_OSS_20B_BYTES),
    ],
)
def test_derived_latencies_follow_from_the_roofline(column: str, name: str, active: float, read: float) -> None:
    """`active`: parameters that compute a token; `read`: bytes of weights that a decode step reads."""
    geometry = PROFILES[name].geometry
    given_figures, latency = tables()[1][column], PROFILES[name].latency
    flops = given_figures["peak, dense 16 bit, TFLOPS"] * 1e12 * given_figures["share of it reached in prefill"]
    bandwidth = given_figures["memory bandwidth, GB/s"] * 1e9 * given_figures["share of it reached in decode"]
    assert 2 * active * 16 / flops == pytest.approx(latency.prefill_block, rel=0.01)
    assert read / bandwidth == pytest.approx(latency.decode, rel=0.01)
    assert given_figures["prefill per block, ms"] == pytest.approx(1e3 * latency.prefill_block)
    assert given_figures["decode step, ms"] == pytest.approx(1e3 * latency.decode)
    assert given_figures["and for each sequence, ms"] == pytest.approx(1e3 * latency.decode_sequence)
    assert latency.prefill_block / 16 == pytest.approx(latency.decode_sequence, rel=0.02)
    assert given_figures["and for 1,000 tokens of context, ms"] == pytest.approx(1e6 * latency.decode_token)
    assert geometry.bytes_per_block(16) / 16 / bandwidth == pytest.approx(latency.decode_token, rel=0.01)


@pytest.mark.parametrize("name", PROFILES)
def test_loads_from_the_host_are_as_fast_as_its_bus(name: str) -> None:
    """PCIe carries 128 bits of data in 130 on each of 16 lanes, 16 (4.0) or 32 (5.0) of these bits a nanosecond."""
    transfers = 32e9 if "h100" in name else 16e9
    assert PROFILES[name].host_bandwidth == pytest.approx(0.8 * 16 * transfers * 128 / 130 / 8, rel=0.001)


def test_llama_2_13b_on_an_a100() -> None:
    default = profile("llama-2-13b-a100-40gb")
    assert default.name == DEFAULT_PROFILE
    assert default.geometry.bytes_per_block(16) == 2 * 40 * 40 * 128 * 2 * 16 == 13_107_200
    assert (default.num_gpu_blocks(16), default.blocks(16)) == (925, 924)
    assert default.blocks(16) * 13_107_200 == 12_111_052_800
    assert default.latency == LatencyModel(0.005, 0.0025, 0.0005, 0.015, 0.000156, 0.62e-6)
    assert pytest.approx(0.62e-6, rel=0.01) == 13_107_200 / 16 / (0.85 * 1_555e9)
    document = DOCUMENT.read_text(encoding="utf-8")
    for sequences in (1, 16):
        step = 15 + sequences * (2.5 / 16 + 500 * 819_200 / (0.85 * 1_555e6))  # ms
        assert 1e3 * default.latency.decode_step(sequences, sequences * 500) == pytest.approx(step, rel=0.001)
        assert f"every {1e3 * default.latency.decode_step(sequences, sequences * 500):.2f} ms" in document.replace(
            "\n", " "
        )


@pytest.mark.parametrize("name", PROFILES)
def test_the_longest_request_fits_into_the_cache(name: str) -> None:
    assert PROFILES[name].blocks(16) * 16 >= PROFILES[name].max_model_len


@given(st.sampled_from(sorted(PROFILES)), st.integers(1, 256))
def test_blocks_fill_what_is_left_of_the_gpu(name: str, block_size: int) -> None:
    one = PROFILES[name]
    size, left = one.geometry.bytes_per_block(block_size), one.gpu_memory - one.weights - one.overhead
    assert 0 <= left - one.num_gpu_blocks(block_size) * size < size


@given(st.sampled_from(sorted(PROFILES)), st.integers(1, 5000), st.integers(1, 128))
def test_the_longest_request_just_fits(name: str, blocks: int, block_size: int) -> None:
    one = PROFILES[name]
    longest = one.longest_request(blocks, block_size)
    assert one.blocks_of(longest, block_size) <= blocks
    assert one.blocks_of(longest + 1, block_size) > blocks


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownProfileError, match=r"use one of: gpt-oss-20b-h100-80gb, llama-2-13b-a100-40gb"):
        profile("gpt-5")


def test_prefill_time() -> None:
    latency = profile(DEFAULT_PROFILE).latency
    assert latency.prefill(0) == 0.0005
    assert latency.prefill(4) == pytest.approx(0.015)
    assert latency.scaled(10).prefill(4) == pytest.approx(0.0015)
    assert latency.scaled(10).prefill(0) == pytest.approx(0.00005)
    assert latency.scaled(10).decode_step(4, 900) == pytest.approx(latency.decode_step(4, 900) / 10)


@pytest.mark.parametrize(
    ("prompt", "cached", "blocks"),
    [(1, 0, 1), (16, 0, 1), (17, 0, 2), (32, 16, 0), (33, 32, 0), (33, 16, 2), (80, 64, 0), (80, 48, 2), (100, 48, 4)],
)
def test_blocks_to_compute(prompt: int, cached: int, blocks: int) -> None:
    assert blocks_to_compute(prompt, cached, 16) == blocks


@given(st.integers(1, 5000), st.integers(1, 64), st.data())
def test_a_longer_hit_never_costs_more(prompt: int, block_size: int, data: st.DataObject) -> None:
    reusable = (prompt - 1) // block_size  # the last token is always recomputed (vLLM rule 8)
    hit = data.draw(st.integers(0, reusable))
    cost = blocks_to_compute(prompt, hit * block_size, block_size)
    assert cost == (0 if hit and hit == reusable else -(-prompt // block_size) - hit)
