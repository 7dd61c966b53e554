"""vLLM's /metrics to a load report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcache.feed import Load
from tests.worker.agent.captures import DATA
from tests.worker.agent.engine import METRICS
from worker.agent.core.load import LoadEstimate, MetricsError, Scrape, parse_scrape

IDLE = Scrape("m", 1, 0, 0, 0.0, 16, 100, 0.0, 0.0)


def test_a_capture_of_vllm() -> None:
    assert parse_scrape((DATA / "metrics.txt").read_text()) == Scrape(
        model="tiny-llama", engines=1, running=0, waiting=0, usage=0.0, block_size=16, blocks=255, prompts=25,
        prompt_tokens=382, prefilled=25, prefilled_tokens=382,
    )  # fmt: skip


def test_what_is_computed_is_preferred_to_what_was_asked() -> None:
    text = METRICS % {"running": 3.0, "waiting": 2, "usage": 0.25, "block_size": 32, "blocks": 101}
    scrape = parse_scrape(text)
    assert (scrape.prompts, scrape.prompt_tokens) == (4, 400)
    name = "vllm:request_prefill_kv_computed_tokens"
    scrape = parse_scrape(text + f'{name}_sum{{engine="0"}} 90.0\n{name}_count{{engine="0"}} 3\n')
    assert (scrape.prompts, scrape.prompt_tokens) == (3, 90)


def test_several_engines_are_added_up() -> None:
    text = METRICS % {"running": 3, "waiting": 2, "usage": 0.5, "block_size": 16, "blocks": 101}
    scrape = parse_scrape(text + text.replace('engine="0"', 'engine="1"'))
    assert (scrape.engines, scrape.running, scrape.waiting, scrape.usage, scrape.blocks) == (2, 6, 4, 0.5, 200)


def test_labels_may_hold_anything() -> None:
    text = METRICS % {"running": 1, "waiting": 0, "usage": 0, "block_size": 16, "blocks": 101}
    assert parse_scrape(text.replace("tiny", r"a \"b\" {c} 5")).model == r"a \"b\" {c} 5"


@pytest.mark.parametrize("blocks", ["None", "", "-3", "x", "0"])
def test_a_cache_of_unknown_size(blocks: str) -> None:
    text = METRICS % {"running": 1, "waiting": 0, "usage": 0, "block_size": blocks, "blocks": blocks}
    assert (parse_scrape(text).blocks, parse_scrape(text).block_size) == (None, None)


@pytest.mark.parametrize("text", ["", "<html>", "vllm:num_requests_running 1", 'vllm:num_requests_running{a="b"} x'])
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


def test_the_mean_prompt_is_that_of_lately_finished_requests() -> None:
    estimate = LoadEstimate(window=2)

    def waiting(prompts: int, tokens: int) -> int:
        return estimate.load(replace(IDLE, waiting=1, prompts=prompts, prompt_tokens=tokens), 100).prefill_tokens

    assert waiting(0, 0) == 0
    assert waiting(10, 1000) == 100
    assert waiting(20, 5000) == 250  # of 20
    assert waiting(30, 15000) == 700  # of 20
    assert waiting(30, 15000) == 1000  # of 10
    assert waiting(30, 15000) == 500  # of all
    assert waiting(1, 7) == 7  # another life
