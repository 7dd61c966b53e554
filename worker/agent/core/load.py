"""The load of an engine, from its `/metrics`."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvcache.feed import Load, Tier

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_USAGE = "vllm:kv_cache_usage_perc"
_CONFIG = "vllm:cache_config_info"
_COMPUTED = "vllm:request_prefill_kv_computed_tokens"
_PROMPT = "vllm:request_prompt_tokens"
_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
_LOAD_SECONDS = "vllm:kv_offload_load_time_total"
_LOADED = "vllm:external_prefix_cache_hits_total"
_READ = (
    _RUNNING,
    _WAITING,
    _USAGE,
    _CONFIG,
    _BY_SOURCE,
    _FIRST_TOKENS,
    _LOAD_SECONDS,
    _LOADED,
    *(name + end for name in (_COMPUTED, _PROMPT) for end in ("_sum", "_count")),
)
"""Begins of the lines that are parsed."""


class MetricsError(ValueError):
    """The text is not what vLLM's `/metrics` answers."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one scrape of `/metrics` says of one engine."""

    model: str
    engine: int
    """Its label `engine`: the data-parallel rank, counted over all servers of the deployment."""
    running: int
    waiting: int
    usage: float
    """Share of the KV cache that running requests use, 0 to 1."""
    block_size: int | None
    blocks: int | None
    """Usable blocks: vLLM keeps one of those that it states empty (vLLM rule 5)."""
    prompts: float
    """Requests finished so far, since the engine started."""
    prompt_tokens: float
    """Prompt tokens of these requests; without cached ones if the engine reports them."""
    prefilled: int = 0
    """Requests that have had their first token."""
    prefilled_tokens: int = 0
    """Prompt tokens that were computed for these requests."""
    block_bytes: int | None = None
    """Bytes of one block."""
    loaded_tokens: float = 0.0
    """Prompt tokens whose blocks were loaded from slower tiers so far."""
    load_seconds: float | None = None
    """Seconds that these loads took; None: the engine has no slower tiers."""


def parse_scrapes(text: str) -> tuple[Scrape, ...]:
    """What one answer of `/metrics` (Prometheus' text format) says of each engine, at least one, in the order of their
    labels. A sample whose value is no finite number counts as missing. Raises `MetricsError`."""
    samples = _samples(text)
    engines = sorted({_engine(sample) for sample in samples[_RUNNING]})
    scrapes = []
    for engine in engines:
        of_engine: defaultdict[str, Sequence[Sample]] = defaultdict(list)
        of_engine |= {name: _of(engine, found) for name, found in samples.items()}
        if not of_engine[_CONFIG] and samples[_CONFIG]:
            of_engine[_CONFIG] = samples[_CONFIG][-1:]
        scrapes.append(_scrape(engine, len(engines), of_engine))
    if not scrapes:
        raise MetricsError(f"{_RUNNING} is missing or not a number: is this vLLM?")
    return tuple(scrapes)


def _engine(sample: Sample) -> int:
    label = sample.labels.get("engine", "")
    return int(label[:9]) if label.isascii() and label.isdecimal() else 0


def _of(engine: int, samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if _engine(sample) == engine]


def _scrape(engine: int, engines: int, samples: Mapping[str, Sequence[Sample]]) -> Scrape:
    running, waiting = samples[_RUNNING], samples[_WAITING]
    if not waiting:
        raise MetricsError(f"{_WAITING} is missing or not a number: is this vLLM?")
    prefilled = [sample for sample in samples[_BY_SOURCE] if sample.labels.get("source") == "local_compute"]
    config = samples[_CONFIG][-1].labels if samples[_CONFIG] else {}
    # vLLM states the sum over its engines (`_apply_ready_response` of v1/engine/core_client.py).
    blocks = _positive(config.get("num_gpu_blocks"))
    blocks = None if blocks is None else blocks // engines
    prompts = _COMPUTED if samples[_COMPUTED + "_count"] else _PROMPT
    return Scrape(
        model=running[0].labels.get("model_name", ""),
        engine=engine,
        running=round(_sum(running)),
        waiting=round(_sum(waiting)),
        usage=_sum(samples[_USAGE]),
        block_size=_positive(config.get("block_size")),
        blocks=None if blocks is None else blocks - 1,
        prompts=_sum(samples[prompts + "_count"]),
        prompt_tokens=_sum(samples[prompts + "_sum"]),
        prefilled=round(_sum(samples[_FIRST_TOKENS])),
        prefilled_tokens=round(_sum(prefilled)),
        block_bytes=(_positive(config.get("kv_cache_memory_bytes")) or 0) // blocks or None if blocks else None,
        loaded_tokens=_sum(samples[_LOADED]),
        load_seconds=_sum(samples[_LOAD_SECONDS]) if samples[_LOAD_SECONDS] else None,
    )


def _samples(text: str) -> Mapping[str, Sequence[Sample]]:
    """The samples with the names in `_READ`, by name. Raises `MetricsError`.

    The parser gets only the lines with these names. For one vLLM 0.32 that takes 0.4 ms a poll; all 374 samples would
    take 6.6 ms, during which the event loop stands still.
    """
    lines = "\n".join(line for line in text.split("\n") if line.startswith(_READ))
    found: dict[str, list[Sample]] = defaultdict(list)
    try:
        for family in text_string_to_metric_families(lines):
            for sample in family.samples:
                if math.isfinite(sample.value):
                    found[sample.name].append(sample)
    except (ValueError, IndexError) as error:  # the parser raises both for malformed labels
        raise MetricsError(f"not in Prometheus' text format: {str(error)[:80]}") from None
    return found


def _sum(samples: Sequence[Sample]) -> float:
    return sum(sample.value for sample in samples)


def _positive(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and int(text) else None


MEASURED_BLOCKS = 256
"""Blocks whose loads make a measurement; until then the bandwidth is assumed, if the size of a block is known."""
CHANGED = 1.5
"""A measurement that differs from the figure in use by more than this factor replaces it."""


def tier_seconds(scrape: Scrape, block_size: int, cpu_bandwidth: float, disk_bandwidth: float) -> Mapping[Tier, float]:
    """Seconds that loading one block from each slower tier takes; empty: the engine has none, or it cannot be known.
    Bandwidths are in bytes a second, for as long as nothing is measured. What lies on a disk is loaded by way of the
    CPU."""
    if scrape.load_seconds is None:
        return {}
    loaded, size = scrape.loaded_tokens / block_size, scrape.block_bytes
    if scrape.load_seconds > 0 and loaded >= (MEASURED_BLOCKS if size is not None else 1):
        cpu = scrape.load_seconds / loaded
    elif size is not None:
        cpu = size / cpu_bandwidth
    else:
        return {}
    return {Tier.CPU: cpu} if size is None else {Tier.CPU: cpu, Tier.DISK: cpu + size / disk_bandwidth}


def has_changed(old: Mapping[Tier, float], new: Mapping[Tier, float]) -> bool:
    """Whether routers should learn the new figures."""
    if old.keys() != new.keys():
        return True
    return any(not old[tier] / CHANGED <= seconds <= old[tier] * CHANGED for tier, seconds in new.items())


class LoadEstimate:
    """Makes the `Load` of a scrape.

    vLLM does not report how many prompt tokens wait. The estimate is the number of waiting requests times the mean
    number of tokens that the requests finished within the last `window` scrapes had to compute (all requests so far, if
    none finished). Running requests do not count, not even one in the middle of a long prefill.
    """

    def __init__(self, window: int = 60) -> None:
        self._scrapes: deque[Scrape] = deque(maxlen=window + 1)

    def load(self, scrape: Scrape, blocks: int) -> Load:
        """The load by this scrape. `blocks`: usable blocks of the cache."""
        if self._scrapes and scrape.prompts < self._scrapes[-1].prompts:
            self._scrapes.clear()  # the engine restarted
        self._scrapes.append(scrape)
        used = min(max(scrape.usage, 0.0), 1.0)
        return Load(
            running=scrape.running,
            waiting=scrape.waiting,
            prefill_tokens=round(scrape.waiting * self.mean_prefill),
            free_blocks=round((1.0 - used) * blocks),
            total_blocks=blocks,
            prefilled=scrape.prefilled,
            prefilled_tokens=scrape.prefilled_tokens,
        )

    @property
    def mean_prefill(self) -> float:
        """Mean number of prompt tokens that a request had to compute, within the window."""
        first, last = self._scrapes[0], self._scrapes[-1]
        if last.prompts > first.prompts:
            return max(last.prompt_tokens - first.prompt_tokens, 0.0) / (last.prompts - first.prompts)
        return last.prompt_tokens / last.prompts if last.prompts else 0.0
