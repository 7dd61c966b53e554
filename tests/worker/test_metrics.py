"""/metrics: vLLM's names, labels and buckets, and figures that add up.

Not covered: the families in `ABSENT`, and metrics of the Python process.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcache.profiles import profile

DATA = Path(__file__).parent.parent / "data" / "vllm"
REAL = (DATA / "metrics.txt").read_text()
TWO_RANKS = (DATA / "metrics_dp2.txt").read_text()

# Parts of vLLM that are not emulated: multimodal inputs, roofline estimates, admission limits.
ABSENT = {
    "vllm:admission_rejections",
    "vllm:estimated_flops_per_gpu",
    "vllm:estimated_read_bytes_per_gpu",
    "vllm:estimated_write_bytes_per_gpu",
    "vllm:mm_cache_hits",
    "vllm:mm_cache_queries",
}


def families(text: str) -> dict[str, Any]:
    """Families by name, without the creation times that the text format gives as gauges."""
    return {f.name: f for f in text_string_to_metric_families(text) if not f.name.endswith("_created")}


def labels(family: Any) -> set[frozenset[tuple[str, str]]]:
    """Label sets of a family: values only where they are part of the name, as buckets and reasons are."""
    named = {"le", "reason", "source", "finished_reason", "sleep_state"}
    return {
        frozenset((name, value if name in named else "") for name, value in sample.labels.items())
        for sample in family.samples
    }


def value(text: str, name: str, **wanted: str) -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and wanted.items() <= sample.labels.items():
                return float(sample.value)
    raise AssertionError(f"no sample {name} {wanted}")


async def scrape(harness: Any) -> str:
    reply = await harness.client.get("/metrics")
    assert reply.header("content-type").startswith("text/plain")
    return reply.text


async def test_every_family_has_vllms_type_labels_and_buckets(start) -> None:
    real, ours = families(REAL), families(await scrape(start()))
    for name, family in real.items():
        if name in ABSENT:
            assert name not in ours
            continue
        assert ours[name].type == family.type, name
        assert ours[name].documentation == family.documentation, name
        assert labels(ours[name]) == labels(family), name


async def test_of_two_ranks_every_family_has_vllms_samples(start) -> None:
    """The same number of samples with the same names of labels, for the same ranks."""

    def shape(family: Any) -> Counter[tuple[str, str, tuple[str, ...]]]:
        return Counter(
            (sample.name, sample.labels.get("engine", ""), tuple(sorted(sample.labels))) for sample in family.samples
        )

    text = await scrape(start(data_parallel_size=2, max_model_len=2048, blocks=255))
    real, ours = families(TWO_RANKS), families(text)
    for name in real.keys() - ABSENT:
        assert shape(ours[name]) == shape(real[name]), name
    sizes = "num_gpu_blocks", "kv_cache_size_tokens", "kv_cache_max_concurrency"
    stated = [
        {tuple(sample.labels[size] for size in sizes) for sample in each["vllm:cache_config_info"].samples}
        for each in (real, ours)
    ]
    assert stated[0] == stated[1]


async def test_buckets_of_token_counts_grow_with_the_context(start) -> None:
    text = await scrape(start(max_model_len=8192))
    assert value(text, "vllm:request_prompt_tokens_bucket", le="5000.0") == 0.0
    assert 'le="10000.0"' not in text


@pytest.mark.looptime
async def test_the_figures_add_up(start) -> None:
    harness = start()
    for _ in range(2):
        body = {"prompt": [5] * 100, "max_tokens": 10, "n": 2, "ignore_eos": True}
        await harness.client.post("/v1/completions", body)
    text = await scrape(harness)
    prefix = "vllm:"
    assert value(text, prefix + "prompt_tokens_total") == 400
    assert value(text, prefix + "prefix_cache_queries_total") == 400
    hits = value(text, prefix + "prefix_cache_hits_total")
    assert hits == value(text, prefix + "prompt_tokens_cached_total") == 3 * 96
    assert value(text, prefix + "prompt_tokens_by_source_total", source="local_cache_hit") == hits
    assert value(text, prefix + "prompt_tokens_by_source_total", source="local_compute") == 400 - hits
    assert value(text, prefix + "generation_tokens_total") == 40
    assert value(text, prefix + "request_success_total", finished_reason="length") == 4
    assert value(text, prefix + "inter_token_latency_seconds_count") == 36
    # Both times, two sequences decode in step: a prompt of 100 tokens, and then the 9 tokens before the last.
    latency = profile("llama-2-13b-a100-40gb").latency
    seconds = 2 * 2 * sum(latency.decode_step(2, 2 * (100 + at)) for at in range(1, 10))
    assert value(text, prefix + "inter_token_latency_seconds_sum") == pytest.approx(seconds)
    assert value(text, prefix + "time_to_first_token_seconds_count") == 4
    assert value(text, prefix + "request_params_n_sum") == 4
    assert value(text, prefix + "request_params_max_tokens_sum") == 20
    assert value(text, prefix + "request_decode_time_seconds_sum") == pytest.approx(seconds)
    assert value(text, prefix + "iteration_tokens_total_sum") == 400 - hits + 36
    assert value(text, prefix + "kv_cache_usage_perc") == 0.0
    assert value(text, prefix + "cache_config_info", num_gpu_blocks="925", block_size="16") == 1.0


@pytest.mark.looptime
async def test_loads_from_the_cpu_are_counted_as_vllm_counts_them(start) -> None:
    """Against the answers' own figures: one prompt, pushed out of the GPU by another, and asked for again."""
    harness = start(blocks=20, max_model_len=320, cpu_blocks=40, cpu_bandwidth=13_107_200_000)

    async def cached(prompt: list[int]) -> int:
        reply = await harness.client.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})
        return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [await cached(prompt) for prompt in ([1] * 100, [2] * 319, [1] * 100)] == [0, 0, 96]
    text = await scrape(harness)
    assert value(text, "vllm:external_prefix_cache_queries_total") == 100 + 319 + 100
    assert value(text, "vllm:external_prefix_cache_hits_total") == 96
    assert value(text, "vllm:prefix_cache_hits_total") == 0
    assert value(text, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == 96
    assert value(text, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 0
    assert value(text, "vllm:prompt_tokens_cached_by_source_total", source="host") == 96
    assert value(text, "vllm:prompt_tokens_cached_total") == 96
    assert value(text, "vllm:kv_offload_load_bytes_total") == 6 * 13_107_200
    assert value(text, "vllm:kv_offload_load_time_total") == pytest.approx(6 * 0.001)
    assert value(text, "vllm:kv_offload_store_bytes_total") == (6 + 19) * 13_107_200
    assert value(text, "vllm:cache_config_info", kv_offloading_size=str(40 * 13_107_200 / 2**30)) == 1.0
    state = (await harness.client.get("/cache/state")).json()
    assert len(state["elsewhere"][0]["keys"]) == 25
    assert state["tier_seconds"] == {"cpu": pytest.approx(0.001)}


@pytest.mark.looptime
async def test_gauges_show_the_present_load(start) -> None:
    harness = start(max_num_seqs=1)
    tasks = [
        harness.client.begin("POST", "/v1/completions", {"prompt": [n] * 160, "max_tokens": 50, "ignore_eos": True})[0]
        for n in range(3)
    ]
    await asyncio.sleep(0.1)
    text = await scrape(harness)
    assert value(text, "vllm:num_requests_running") == 1
    assert value(text, "vllm:num_requests_waiting") == 2
    assert value(text, "vllm:num_requests_waiting_by_reason", reason="capacity") == 2
    assert value(text, "vllm:kv_cache_usage_perc") == pytest.approx(11 / 924)
    assert value(text, "vllm:generation_tokens_total") > 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert value(await scrape(harness), "vllm:request_success_total", finished_reason="abort") == 3


@pytest.mark.looptime
async def test_the_times_are_those_that_clients_see(start) -> None:
    harness, loop = start(max_num_seqs=1), asyncio.get_running_loop()
    follower, feed = harness.client.begin("GET", "/cache/events")
    body = {"max_tokens": 10, "stream": True, "ignore_eos": True}
    began = loop.time()
    answers = [harness.client.begin("POST", "/v1/completions", body | {"prompt": [n] * 160}) for n in (1, 2)]
    await asyncio.gather(*(task for task, _ in answers))
    text = await scrape(harness)
    assert value(text, "kvcluster_worker_feed_subscribers") == 1
    written = [[at - began for at, part in reply.writes if b"data: {" in part] for _, reply in answers]
    assert [len(times) for times in written] == [10, 10]
    firsts, lasts = [times[0] for times in written], [times[-1] for times in written]
    queued = lasts[0]  # the second request waits for the end of the first
    sums = {
        "time_to_first_token": sum(firsts),
        "e2e_request_latency": sum(lasts),
        "request_queue_time": queued,
        "request_prefill_time": sum(firsts) - queued,
        "request_inference_time": sum(lasts) - queued,
        "request_decode_time": sum(lasts) - sum(firsts),
        "request_time_per_output_token": (sum(lasts) - sum(firsts)) / 9,
    }
    # Timers of the event loop are up to 1 ms late, and each time counts in several sums.
    shown = {name: value(text, f"vllm:{name}_seconds_sum") for name in sums}
    assert shown == pytest.approx(sums, abs=0.01)
    assert value(text, "kvcluster_worker_busy_seconds_total") == pytest.approx(lasts[1], abs=0.01)
    lengths = ("request_prompt_tokens", "request_prefill_kv_computed_tokens", "request_generation_tokens")
    assert [value(text, f"vllm:{name}_sum") for name in lengths] == [320, 320, 20]
    assert value(text, "vllm:request_max_num_generation_tokens_sum") == 20
    assert value(text, "kvcluster_worker_feed_batches_total") == feed.text.count("event: batch") > 0
    assert value(text, "kvcluster_worker_feed_resets_total") == 0
    assert value(text, "kvcluster_worker_draining") == 0
    assert await harness.worker.finish_requests(1.0)
    await follower
    text = await scrape(harness)
    assert (value(text, "kvcluster_worker_draining"), value(text, "kvcluster_worker_feed_subscribers")) == (1, 0)


@pytest.mark.looptime
async def test_preemptions_are_counted_once_in_both_forms(start) -> None:
    harness = start(blocks=12, max_model_len=None)
    body = {"max_tokens": 60, "ignore_eos": True}
    await asyncio.gather(*(harness.client.post("/v1/completions", body | {"prompt": [n] * 60}) for n in (1, 2)))
    text = await scrape(harness)
    # Both hold 4 blocks and grow to 8: 12 are enough until one would need its seventh.
    assert value(text, "vllm:num_preemptions_total") == value(text, "vllm:request_num_preemptions_sum") == 1
    assert value(text, "vllm:request_num_preemptions_bucket", le="1.0") == 2


async def test_openmetrics_is_served_on_request(start) -> None:
    reply = await start().client.get("/metrics", {"accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.header("content-type").startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")


async def test_the_document_lists_the_workers_own_metrics(start) -> None:
    document = (Path(__file__).parents[2] / "docs" / "worker.md").read_text()
    listed = set(re.findall(r"`(kvcluster_worker_\w+)`", document))
    scraped = set(re.findall(r"^(kvcluster_worker_\w+)", await scrape(start()), re.MULTILINE))
    assert listed == {name for name in scraped if not name.endswith("_created")}
