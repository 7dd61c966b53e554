"""What GET /metrics of the emulator reports: vLLM's names, labels and buckets, and a few of the worker's own.

Histograms are filled as requests run; counters and gauges are read from the engine at each scrape. A histogram is a
list and a bisection, because the one of the Prometheus client takes a lock for every token.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcache.profiles import GIB
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.request import FinishedRequest
from worker.feed.log import FeedLog

_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
            960.0, 1920.0, 7680.0)  # fmt: skip
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
         160.0, 640.0, 2560.0)  # fmt: skip
_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                  80.0)  # fmt: skip
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_N = (1.0, 2.0, 5.0, 10.0, 20.0)


def length_buckets(max_model_len: int) -> tuple[float, ...]:
    """vLLM's buckets for token counts: 1, 2, 5, 10, 20, 50, ... up to the model's context."""
    bounds: list[float] = []
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power > max_model_len:
                return tuple(bounds)
            bounds.append(float(step * power))
        power *= 10


class Histogram:
    """Counts of observations by upper bound."""

    __slots__ = ("bounds", "counts", "help", "name", "sum")

    def __init__(self, name: str, help: str, bounds: tuple[float, ...]) -> None:  # noqa: A002 (Prometheus' word)
        self.name = name
        self.help = help
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulative count) of each bucket, as Prometheus defines them."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class EngineMetrics:
    """The histograms of one engine: an `Observer` of its `AsyncEngine`."""

    def __init__(self, max_model_len: int) -> None:
        lengths = length_buckets(max_model_len)

        def h(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, bounds)

        self.prompt_tokens = h("request_prompt_tokens", "Number of prefill tokens processed.", lengths)
        self.generation_tokens = h("request_generation_tokens", "Number of generation tokens processed.", lengths)
        self.max_generation_tokens = h(
            "request_max_num_generation_tokens", "Histogram of maximum number of requested generation tokens.", lengths
        )
        self.params_n = h("request_params_n", "Histogram of the n request parameter.", _N)
        self.params_max_tokens = h(
            "request_params_max_tokens", "Histogram of the max_tokens request parameter.", lengths
        )
        self.ttft = h("time_to_first_token_seconds", "Histogram of time to first token in seconds.", _TTFT)
        self.token_gaps = h(
            "inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", _TOKEN_SECONDS
        )
        self.tpot = h(
            "request_time_per_output_token_seconds",
            "Histogram of time_per_output_token_seconds per request.",
            _TOKEN_SECONDS,
        )
        self.e2e = h("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", _SECONDS)
        self.queue = h("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", _SECONDS)
        self.inference = h(
            "request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request.", _SECONDS
        )
        self.prefill = h(
            "request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", _SECONDS
        )
        self.decode = h("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", _SECONDS)
        self.preemptions = h(
            "request_num_preemptions", "Histogram of the number of times a request was preempted.", _PREEMPTIONS
        )
        self.prefill_computed = h(
            "request_prefill_kv_computed_tokens",
            "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
            lengths,
        )
        self.generated = 0
        """Tokens generated so far, including those of unfinished requests."""

    def token(self, gap: float | None) -> None:
        self.generated += 1
        if gap is not None:
            self.token_gaps.observe(gap)

    def prompt_accepted(self, n: int, max_tokens: int) -> None:
        """A prompt was accepted, for `n` answers of at most `max_tokens` tokens each."""
        self.params_n.observe(n)
        self.params_max_tokens.observe(max_tokens)

    def finished(self, request: FinishedRequest) -> None:
        times = request.times
        for histogram, value in (
            (self.ttft, times.ttft),
            (self.tpot, request.time_per_output_token),
            (self.e2e, times.e2e),
            (self.queue, times.queue),
            (self.inference, times.inference),
            (self.prefill, times.prefill),
            (self.decode, times.decode),
        ):
            if value is not None:
                histogram.observe(value)
        self.prompt_tokens.observe(request.prompt_tokens)
        self.generation_tokens.observe(request.output_tokens)
        self.max_generation_tokens.observe(request.output_tokens)
        self.preemptions.observe(request.preemptions)
        self.prefill_computed.observe(request.prompt_tokens - request.cached_tokens)

    def histograms(self) -> list[Histogram]:
        return [value for value in vars(self).values() if isinstance(value, Histogram)]


FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """The worker's own figures, read at each scrape."""

    push_failures: Callable[[], int]
    draining: Callable[[], bool]


@dataclass(eq=False)
class WorkerCollector(Collector):
    """Makes metric families of the state of all data-parallel ranks. Those of vLLM have a sample for each rank, in the
    order of `engines`; the worker's own are sums."""

    engines: Sequence[EngineCollector]
    feeds: Sequence[FeedLog]
    counts: WorkerCounts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for engine in self.engines:
            for family in engine.collect():
                whole = families.setdefault(family.name, family)
                if whole is not family:
                    # An equal sample is one that does not say which engine it is about.
                    known = [(sample.name, sample.labels) for sample in whole.samples]
                    whole.samples += [each for each in family.samples if (each.name, each.labels) not in known]
        yield from families.values()
        yield from self._own()

    def _own(self) -> Iterable[Metric]:
        """Metrics that vLLM does not have: see docs/worker.md."""
        prefix = "kvcluster_worker_"
        feeds, counts = self.feeds, self.counts
        yield GaugeMetricFamily(
            prefix + "feed_subscribers",
            "Routers that read the cache feed now.",
            float(sum(feed.subscribers for feed in feeds)),
        )
        yield CounterMetricFamily(
            prefix + "feed_batches", "Batches of cache events published.", float(sum(feed.seq for feed in feeds))
        )
        yield CounterMetricFamily(
            prefix + "feed_resets",
            "Times a subscriber was told to take a new snapshot.",
            float(sum(feed.resets for feed in feeds)),
        )
        yield CounterMetricFamily(
            prefix + "push_failures", "Pushes to a router that failed.", float(counts.push_failures())
        )
        yield GaugeMetricFamily(
            prefix + "draining", "1 while the worker finishes its last requests.", float(counts.draining())
        )
        busy = sum(each.engine.stats.busy_seconds for each in self.engines)
        yield CounterMetricFamily(prefix + "busy_seconds", "Seconds of engine steps.", busy)


@dataclass(eq=False)
class EngineCollector:
    """Makes metric families of one engine's state; `rank` is its label `engine`."""

    engine: Engine
    metrics: EngineMetrics
    model: str
    cache_config: Mapping[str, str]
    block_bytes: int
    rank: int = 0
    _created: float = field(default_factory=time.time, init=False)

    def collect(self) -> Iterable[Metric]:
        """The families, each with the samples of this engine."""
        yield from self._gauges()
        yield from self._counters()
        steps = Histogram("vllm:iteration_tokens_total", "Histogram of number of tokens per engine_step.", STEP_TOKENS)
        for tokens, times in self.engine.stats.step_tokens.items():
            steps.observe(tokens, times)
        for histogram in (*self.metrics.histograms(), steps):
            yield self._histogram(histogram)
        labels = {**self.cache_config, "engine": str(self.rank)}
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=list(labels)
        )
        info.add_metric(list(labels.values()), 1.0)
        yield info

    def _gauges(self) -> Iterable[Metric]:
        load = self.engine.load()
        used = 1.0 - load.free_blocks / load.total_blocks
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", {"": load.running})
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", {"": load.waiting})
        yield self._gauge(
            "num_requests_waiting_by_reason",
            "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; "
            "'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all "
            "reasons equals vllm:num_requests_waiting.",
            {"capacity": load.waiting - self.engine.deferred, "deferred": self.engine.deferred},
            "reason",
        )
        yield self._gauge(
            "engine_sleep_state",
            "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; "
            "weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
            {"awake": 1, "weights_offloaded": 0, "discard_all": 0},
            "sleep_state",
        )
        if max_loras := self.engine.config.max_loras:
            # vLLM names the adapters of every unfinished request under both labels, and keeps past combinations.
            adapters = ",".join(self.engine.adapters())
            info = GaugeMetricFamily(
                "vllm:lora_requests_info",
                "Running stats on lora requests.",
                labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            )
            info.add_metric([str(max_loras), adapters, adapters], time.time())
            yield info
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", {"": used})

    def _counters(self) -> Iterable[Metric]:
        stats = self.engine.stats
        cached = stats.cached_prompt_tokens
        yield self._counter(
            "prefix_cache_queries",
            "Prefix cache queries, in terms of number of queried tokens.",
            {"": stats.prefix_cache_queries},
        )
        yield self._counter(
            "prefix_cache_hits",
            "Prefix cache hits, in terms of number of cached tokens.",
            {"": stats.prefix_cache_hits},
        )
        yield self._counter(
            "num_preemptions", "Cumulative number of preemption from the engine.", {"": stats.preemptions}
        )
        yield self._counter("prompt_tokens", "Number of prefill tokens processed.", {"": stats.prompt_tokens})
        yield self._counter(
            "prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            {
                "local_compute": stats.prompt_tokens - cached,
                "local_cache_hit": cached - stats.loaded_prompt_tokens,
                "external_kv_transfer": stats.loaded_prompt_tokens,
            },
            "source",
        )
        yield self._counter("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", {"": cached})
        yield self._counter(
            "prompt_tokens_cached_by_source",
            "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), host (offloaded to "
            "DRAM), disk, p2p (transferred from another vLLM instance) or external_unspecified. Counted at admission; "
            "sums to vllm:prefix_cache_hits + vllm:external_prefix_cache_hits.",
            {
                "device": stats.prefix_cache_hits,
                "host": stats.external_cache_hits,
                "p2p": 0,
                "disk": 0,
                "external_unspecified": 0,
            },
            "source",
        )
        yield from self._offloading()
        yield self._counter("generation_tokens", "Number of generation tokens processed.", {"": self.metrics.generated})
        yield self._counter(
            "request_success",
            "Count of successfully processed requests.",
            {reason: stats.finished[reason] for reason in FINISHED_REASONS},  # type: ignore[index]
            "finished_reason",
        )

    def _offloading(self) -> Iterable[Metric]:
        """What vLLM counts of its KV connector. The external prefix cache is counted without one, too."""
        stats, block_bytes = self.engine.stats, self.block_bytes
        yield self._counter(
            "external_prefix_cache_queries",
            "External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of "
            "queried tokens.",
            {"": stats.external_cache_queries},
        )
        yield self._counter(
            "external_prefix_cache_hits",
            "External prefix cache hits from KV connector cross-instance cache sharing, in terms of number of cached "
            "tokens.",
            {"": stats.external_cache_hits},
        )
        if not self.engine.config.cpu_blocks:
            return
        yield self._counter(
            "kv_offload_load_bytes",
            "Total bytes loaded from offload storage to GPU.",
            {"": stats.loaded_blocks * block_bytes},
        )
        yield self._counter(
            "kv_offload_load_time",
            "Total load time from offload storage to GPU, in seconds.",
            {"": stats.load_seconds},
        )
        yield self._counter(
            "kv_offload_store_bytes",
            "Total bytes stored from GPU to offload storage.",
            {"": self.engine.offloaded_blocks * block_bytes},
        )

    def _gauge(self, name: str, text: str, values: Mapping[str, float], label: str = "") -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=self._labels(label))
        for value, number in values.items():
            family.add_metric(self._values(value), number)
        return family

    def _counter(self, name: str, text: str, values: Mapping[str, float], label: str = "") -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=self._labels(label))
        for value, number in values.items():
            family.add_metric(self._values(value), number, created=self._created)
        return family

    def _histogram(self, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(histogram.name, histogram.help, labels=["engine", "model_name"])
        family.add_metric([str(self.rank), self.model], buckets=histogram.buckets(), sum_value=histogram.sum)
        return family

    def _labels(self, label: str) -> list[str]:
        return ["engine", "model_name", label] if label else ["engine", "model_name"]

    def _values(self, value: str) -> list[str]:
        return [str(self.rank), self.model, value] if value else [str(self.rank), self.model]


def cache_config(
    *,
    block_size: int,
    blocks: int,
    max_model_len: int,
    prefix_caching: bool,
    block_bytes: int,
    cpu_blocks: int,
    ranks: int = 1,
) -> dict[str, str]:
    """Labels of vllm:cache_config_info, of each of `ranks` data-parallel ranks alike. `blocks`: usable blocks of one;
    vLLM also counts the null block, and states the sum over the ranks as `num_gpu_blocks`."""
    physical = blocks + 1
    return {
        "_block_size_resolved": "True",
        "block_size": str(block_size),
        "cache_dtype": "auto",
        "cache_hit_alignment_tokens": "None",
        "effective_attention_block_size": str(block_size),
        "enable_mamba_shared_prefix_checkpoint": "False",
        "enable_prefix_caching": str(prefix_caching),
        "gpu_memory_utilization": "0.92",
        "hash_block_size": "None",
        "is_attention_free": "False",
        "kv_cache_dtype_skip_layers": "[]",
        "kv_cache_layout": "None",
        "kv_cache_max_concurrency": str(round(physical * block_size / max_model_len, 2)),
        "kv_cache_memory_bytes": str(physical * block_bytes),
        "kv_cache_size_tokens": str(physical * block_size),
        "kv_offloading_backend": "native",
        "kv_offloading_size": str(cpu_blocks * block_bytes / GIB) if cpu_blocks else "None",
        "kv_sharing_fast_prefill": "False",
        "mamba_block_size": "None",
        "mamba_cache_dtype": "auto",
        "mamba_cache_mode": "none",
        "mamba_page_size_padded": "None",
        "mamba_ssm_cache_dtype": "float32",
        "num_cpu_blocks": "None",
        "num_gpu_blocks": str(physical * ranks),
        "num_gpu_blocks_override": "None",
        "prefix_cache_retention_interval": "0",
        "prefix_caching_hash_algo": "sha256",
        "prefix_match_unit": "None",
        "replayssm_buffer_len": "16",
        "skip_page_size_padded": "None",
        "sliding_window": "None",
        "swa_bounded_replay": "True",
        "use_kda_recoverssm": "False",
        "use_replayssm": "False",
        "user_specified_block_size": "True",
    }
