"""What an engine is busy with, read off its `/metrics`."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from kvcache.feed import Load

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_USAGE = "vllm:kv_cache_usage_perc"
_CONFIG = "vllm:cache_config_info"
_COMPUTED = "vllm:request_prefill_kv_computed_tokens"
_PROMPT = "vllm:request_prompt_tokens"
_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
_READ = frozenset(
    {
        _RUNNING,
        _WAITING,
        _USAGE,
        _CONFIG,
        _BY_SOURCE,
        _FIRST_TOKENS,
        *(name + end for name in (_COMPUTED, _PROMPT) for end in ("_sum", "_count")),
    }
)


class MetricsError(ValueError):
    """The text is not what vLLM's `/metrics` answers."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One answer of `/metrics`. With data parallelism, sums over the engines behind it."""

    model: str
    engines: int
    running: int
    waiting: int
    usage: float
    """Of the KV cache by running requests, 0 to 1."""
    block_size: int | None
    blocks: int | None
    """Usable ones: vLLM keeps one of them empty (vLLM rule 5)."""
    prompts: float
    """Requests finished so far."""
    prompt_tokens: float
    """Their prompt tokens, without those that came from the cache where the engine tells."""
    prefilled: int = 0
    """Requests that reached their first token so far."""
    prefilled_tokens: int = 0
    """Prompt tokens computed for these."""


def parse_scrape(text: str) -> Scrape:
    """Raises `MetricsError`."""
    values: dict[str, list[float]] = defaultdict(list)
    models: dict[str, None] = {}
    config: Mapping[str, str] = {}
    for line in text.splitlines():
        name = line.partition("{")[0]
        if name not in _READ:
            continue
        labels, _, value = line.rpartition(" ")
        try:
            values[name].append(float(value))
        except ValueError:
            raise MetricsError(f"{name} has no value: {value[:40]!r}") from None
        found = dict(_LABEL.findall(labels))
        if name == _BY_SOURCE and found.get("source") != "local_compute":
            values[name].pop()
        if name == _CONFIG:
            config = found
        elif name == _RUNNING:
            models[found.get("model_name", "")] = None
    if not values[_RUNNING] or not values[_WAITING]:
        raise MetricsError(f"{_RUNNING} or {_WAITING} is missing: is this vLLM?")
    tokens = _COMPUTED if values[_COMPUTED + "_count"] else _PROMPT
    engines = len(values[_RUNNING])
    blocks = _number(config.get("num_gpu_blocks"))
    return Scrape(
        model=next(iter(models)),
        engines=engines,
        running=round(sum(values[_RUNNING])),
        waiting=round(sum(values[_WAITING])),
        usage=sum(values[_USAGE]) / engines,
        block_size=_number(config.get("block_size")),
        blocks=None if blocks is None else (blocks - 1) * engines,
        prompts=sum(values[tokens + "_count"]),
        prompt_tokens=sum(values[tokens + "_sum"]),
        prefilled=round(sum(values[_FIRST_TOKENS])),
        prefilled_tokens=round(sum(values[_BY_SOURCE])),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and int(text) else None


class LoadEstimate:
    """Readings to `Load`s.

    vLLM does not say how many prompt tokens wait. They are estimated as waiting requests times the mean of what the
    requests that finished during the last `window` readings had to compute (of all so far, if none finished). Of
    running requests nothing is counted, so a long prompt in the middle of its prefill weighs nothing here.
    """

    def __init__(self, window: int = 60) -> None:
        self._scrapes: deque[Scrape] = deque(maxlen=window + 1)

    def load(self, scrape: Scrape, blocks: int) -> Load:
        """`blocks` are usable ones."""
        if self._scrapes and scrape.prompts < self._scrapes[-1].prompts:
            self._scrapes.clear()  # another life of the engine
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
        """Tokens that a request had to compute before its first one, lately."""
        first, last = self._scrapes[0], self._scrapes[-1]
        if last.prompts > first.prompts:
            return max(last.prompt_tokens - first.prompt_tokens, 0.0) / (last.prompts - first.prompts)
        return last.prompt_tokens / last.prompts if last.prompts else 0.0
