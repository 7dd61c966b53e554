"""vLLM's /metrics to a load report: expositions written by hand, and one capture of vLLM 0.32.

Not covered: OpenMetrics, which the agent does not ask for, and how good an estimate of the waiting prompts' tokens is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcache.feed import Load, Tier
from tests.worker.agent.captures import DATA
from tests.worker.agent.engine import METRICS
from worker.agent.core.load import LoadEstimate, MetricsError, Scrape, has_changed, parse_scrapes, tier_seconds

IDLE = Scrape("m", 0, 0, 0, 0.0, 16, 100, 0.0, 0.0)


def parse_scrape(text: str) -> Scrape:
    """What is said of the only engine."""
    (scrape,) = parse_scrapes(text)
    return scrape


def test_a_capture_of_vllm() -> None:
    assert parse_scrape((DATA / "metrics.txt").read_text()) == Scrape(
        model="tiny-llama", engine=0, running=0, waiting=0, usage=0.0, block_size=16, blocks=255, prompts=25,
        prompt_tokens=382, prefilled=25, prefilled_tokens=382,
        block_bytes=4 * 2**20,
    )  # fmt: skip


def test_a_capture_of_two_data_parallel_ranks() -> None:
    first, second = parse_scrapes((DATA / "metrics_dp2.txt").read_text())
    assert (first.engine, first.prompts, first.prefilled_tokens) == (0, 30, 1772)
    assert (second.engine, second.prompts, second.prefilled_tokens) == (1, 32, 1706)
    assert {(each.blocks, each.block_size, each.block_bytes) for each in (first, second)} == {(255, 16, 4 * 2**20)}


def test_what_is_computed_is_preferred_to_what_was_asked() -> None:
    text = METRICS % {"running": 3.0, "waiting": 2, "usage": 0.25, "block_size": 32, "blocks": 101}
    scrape = parse_scrape(text)
    assert (scrape.prompts, scrape.prompt_tokens) == (4, 400)
    name = "vllm:request_prefill_kv_computed_tokens"
    scrape = parse_scrape(text + f'{name}_sum{{engine="0"}} 90.0\n{name}_count{{engine="0"}} 3\n')
    assert (scrape.prompts, scrape.prompt_tokens) == (3, 90)


def test_each_of_several_engines() -> None:
    """As of vLLM 0.32 with --data-parallel-size: `num_gpu_blocks` is the sum, the memory that of one engine."""
    text = METRICS % {"running": 3, "waiting": 2, "usage": 0.5, "block_size": 16, "blocks": 202}
    text = text.replace("num_gpu_blocks", 'kv_cache_memory_bytes="1010",num_gpu_blocks')
    other = text.replace('engine="0"', 'engine="10"').replace("} 3", "} 5").replace("} 400.0", "} 900.0")
    first, second = parse_scrapes(other + text)
    assert (first.engine, first.running, first.waiting, first.usage, first.blocks) == (0, 3, 2, 0.5, 100)
    assert (second.engine, second.running, second.waiting, second.usage, second.blocks) == (10, 5, 2, 0.5, 100)
    assert (first.prompt_tokens, second.prompt_tokens, second.block_bytes) == (400, 900, 10)


def test_an_engine_that_says_less_than_another() -> None:
    text = METRICS % {"running": 3, "waiting": 2, "usage": 0.5, "block_size": 16, "blocks": 202}
    running = 'vllm:num_requests_running{engine="1"} 1\n'
    waiting = 'vllm:num_requests_waiting{engine="1"} 0\n'
    _, second = parse_scrapes(text + running + waiting)
    assert (second.running, second.block_size, second.blocks, second.prompts) == (1, 16, 100, 0)
    with pytest.raises(MetricsError, match="num_requests_waiting"):
        parse_scrapes(text + running)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        pytest.param(r"a \"b\" c", 'a "b" c', id="quotes"),
        pytest.param(r"a\\b", "a\\b", id="backslash"),
        pytest.param(r"a\nb", "a\nb", id="line break"),
        pytest.param("a,b={c}", "a,b={c}", id="comma, equals sign and braces"),
        pytest.param("a # {b} 5", "a # {b} 5", id="what looks like an exemplar"),
        pytest.param("a\u2028b\x0bc", "a\u2028b\x0bc", id="other line separators than Prometheus'"),
    ],
)
def test_the_value_of_a_label(written: str, name: str) -> None:
    scrape = parse_scrape(
        f'vllm:num_requests_running{{engine="0",model_name="{written}"}} 3\nvllm:num_requests_waiting{{engine="0"}} 0\n'
    )
    assert (scrape.model, scrape.running) == (name, 3)


SPREAD = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running { model_name="m" , engine="0", } 3 1700000000000
vllm:num_requests_waiting{engine="0"}\t2.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 7 # {trace_id="a\\"b"} 0.54 1700000000.5
vllm:time_to_first_token_seconds_count{engine="0"} 7 # {trace_id="x"} 0.54
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 6.5e+02 # {trace_id="x"} 1.0 1700000000.5
vllm:prompt_tokens_by_source_total{engine="0",source="local_cache_hit"} 44
http_requests_total{handler="/x"} NaN
http_request_duration_seconds_sum{handler="/x"} +Inf
what no exposition has}
"""


def test_what_the_format_allows_beside_name_and_value() -> None:
    """Blanks, timestamps, exemplars; and lines of other families, whatever they say."""
    scrape = parse_scrape(SPREAD)
    assert (scrape.running, scrape.waiting, scrape.prefilled, scrape.prefilled_tokens) == (3, 2, 7, 650)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"])
def test_a_value_that_is_no_finite_number_counts_as_missing(value: str) -> None:
    values = {"running": 1, "waiting": 0, "usage": 0.5, "block_size": 16, "blocks": 101}
    assert parse_scrape(METRICS % (values | {"usage": value})).usage == 0.0
    with pytest.raises(MetricsError, match="num_requests_running"):
        parse_scrape(METRICS % (values | {"running": value}))


@pytest.mark.parametrize("blocks", ["None", "", "-3", "x", "0"])
def test_a_cache_of_unknown_size(blocks: str) -> None:
    text = METRICS % {"running": 1, "waiting": 0, "usage": 0, "block_size": blocks, "blocks": blocks}
    assert (parse_scrape(text).blocks, parse_scrape(text).block_size) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("<html>", id="a page"),
        pytest.param("vllm:num_requests_running 1", id="nothing waiting"),
        pytest.param('vllm:num_requests_running{a="b"} x', id="no number"),
        pytest.param('vllm:num_requests_running{a="b 1', id="an open label"),
        pytest.param('vllm:num_requests_running{a="b", ="c"} 1', id="a label without a name"),
    ],
)
def test_what_is_not_vllms(text: str) -> None:
    with pytest.raises(MetricsError):
        parse_scrape(text)


def test_the_load() -> None:
    scrape = replace(
        IDLE, running=3, waiting=2, usage=0.25, prompts=4, prompt_tokens=400, prefilled=7, prefilled_tokens=650
    )
    assert LoadEstimate().load(scrape, 100) == Load(3, 2, 200, 75, 100, prefilled=7, prefilled_tokens=650)


@pytest.mark.parametrize(("usage", "free"), [(-0.1, 100), (1.2, 0)])
def test_a_usage_out_of_range(usage: float, free: int) -> None:
    assert LoadEstimate().load(replace(IDLE, usage=usage), 100).free_blocks == free


def test_the_mean_prompt_is_that_of_recently_finished_requests() -> None:
    estimate = LoadEstimate(window=2)

    def waiting(prompts: int, tokens: int) -> int:
        return estimate.load(replace(IDLE, waiting=1, prompts=prompts, prompt_tokens=tokens), 100).prefill_tokens

    assert waiting(0, 0) == 0
    assert waiting(10, 1000) == 100
    assert waiting(20, 5000) == 250  # of 20
    assert waiting(30, 15000) == 700  # of 20
    assert waiting(30, 15000) == 1000  # of 10
    assert waiting(30, 15000) == 500  # of all
    assert waiting(1, 7) == 7  # restarted


# --- the time of loading a block --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "loaded", "seconds", "expected"),
    [
        pytest.param(2_000_000, 0, None, {}, id="no offloading"),
        pytest.param(2_000_000, 0, 0.0, {Tier.CPU: 1e-4, Tier.DISK: 1.1e-3}, id="nothing loaded yet"),
        pytest.param(2_000_000, 100, 0.3, {Tier.CPU: 1e-4, Tier.DISK: 1.1e-3}, id="too little to measure"),
        pytest.param(2_000_000, 300, 0.6, {Tier.CPU: 2e-3, Tier.DISK: 3e-3}, id="measured"),
        pytest.param(None, 0, 0.0, {}, id="size not known, nothing loaded"),
        pytest.param(None, 10, 0.02, {Tier.CPU: 2e-3}, id="size not known, a little measured"),
    ],
)
def test_the_time_of_a_load_is_assumed_until_it_is_measured(
    size: int | None, loaded: int, seconds: float | None, expected: dict[Tier, float]
) -> None:
    scrape = replace(IDLE, block_bytes=size, loaded_tokens=16.0 * loaded, load_seconds=seconds)
    assert tier_seconds(scrape, 16, cpu_bandwidth=20e9, disk_bandwidth=2e9) == pytest.approx(expected)


def test_what_vllm_counts_of_its_loads_is_read() -> None:
    text = METRICS % {"running": 0, "waiting": 0, "usage": 0.0, "block_size": 16, "blocks": 101}
    assert parse_scrape(text).load_seconds is None
    scrape = parse_scrape(
        text
        + 'vllm:kv_offload_load_time_total{engine="0",model_name="tiny"} 0.25\n'
        + 'vllm:external_prefix_cache_hits_total{engine="0",model_name="tiny"} 4800.0\n'
    )
    assert (scrape.load_seconds, scrape.loaded_tokens) == (0.25, 4800.0)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        pytest.param({Tier.CPU: 1.0}, {Tier.CPU: 1.4}, False, id="a little slower"),
        pytest.param({Tier.CPU: 1.0}, {Tier.CPU: 1.6}, True, id="slower"),
        pytest.param({Tier.CPU: 1.0}, {Tier.CPU: 0.6}, True, id="faster"),
        pytest.param({}, {Tier.CPU: 1.0}, True, id="a new tier"),
        pytest.param({Tier.CPU: 1.0}, {}, True, id="no tier any more"),
    ],
)
def test_small_changes_are_not_published(old: dict[Tier, float], new: dict[Tier, float], changed: bool) -> None:
    assert has_changed(old, new) == changed
