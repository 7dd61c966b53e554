"""What the worker measures of its engine as it happens; counters are read from the engine when they are asked for.

A histogram is a plain list and a bisection: the Prometheus client's own takes a lock for every token.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from worker.emulator.engine import FinishedRequest

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
    """1, 2, 5, 10, 20, 50, ... up to the model's context: vLLM's buckets for token counts."""
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
        """(upper bound, observations up to it), as Prometheus wants them."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class EngineMetrics:
    """What is observed as it happens: an `Observer` of the runner."""

    def __init__(self, max_model_len: int) -> None:
        lengths = length_buckets(max_model_len)
        h = Histogram
        self.prompt_tokens = h("vllm:request_prompt_tokens", "Number of prefill tokens processed.", lengths)
        self.generation_tokens = h("vllm:request_generation_tokens", "Number of generation tokens processed.", lengths)
        self.max_generation_tokens = h(
            "vllm:request_max_num_generation_tokens",
            "Histogram of maximum number of requested generation tokens.",
            lengths,
        )
        self.params_n = h("vllm:request_params_n", "Histogram of the n request parameter.", _N)
        self.params_max_tokens = h(
            "vllm:request_params_max_tokens", "Histogram of the max_tokens request parameter.", lengths
        )
        self.ttft = h("vllm:time_to_first_token_seconds", "Histogram of time to first token in seconds.", _TTFT)
        self.token_gaps = h(
            "vllm:inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", _TOKEN_SECONDS
        )
        self.tpot = h(
            "vllm:request_time_per_output_token_seconds",
            "Histogram of time_per_output_token_seconds per request.",
            _TOKEN_SECONDS,
        )
        self.e2e = h("vllm:e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", _SECONDS)
        self.queue = h(
            "vllm:request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", _SECONDS
        )
        self.inference = h(
            "vllm:request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request.", _SECONDS
        )
        self.prefill = h(
            "vllm:request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", _SECONDS
        )
        self.decode = h(
            "vllm:request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", _SECONDS
        )
        self.preemptions = h(
            "vllm:request_num_preemptions",
            "Histogram of the number of times a request was preempted.",
            _PREEMPTIONS,
        )
        self.prefill_computed = h(
            "vllm:request_prefill_kv_computed_tokens",
            "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
            lengths,
        )
        self.generated = 0
        """Tokens so far, those of unfinished requests included."""

    def token(self, gap: float | None) -> None:
        self.generated += 1
        if gap is not None:
            self.token_gaps.observe(gap)

    def asked(self, n: int, max_tokens: int) -> None:
        """A prompt was accepted, with `n` answers of at most `max_tokens`."""
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
