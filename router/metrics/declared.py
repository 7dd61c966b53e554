"""Every counter and histogram that the router counts itself."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as LibraryCounter
from prometheus_client import Histogram as LibraryHistogram

from router.core.decision import CacheUse, DecisionPhase
from router.metrics.instruments import Counter, Histogram, LabelledCounter, LabelledHistogram

PREFIX = "kvcluster_router_"

TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0),
)
"""vLLM's buckets, made finer below 1 s: the two histograms can be compared."""
TPOT_BUCKETS = (
    *(0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""vLLM's buckets, made finer below 50 ms."""
REQUEST_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0),
)
"""vLLM's, made finer below 0.3 s."""
OVER, UNDER = ("over",), ("under",)
"""Directions of a wrong prediction, as labels."""
DECISION_BUCKETS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5),
)
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
BLOCK_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Every counter and histogram. Gauges are read at each scrape by the collectors."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def rare(name: str, text: str, *labels: str) -> LibraryCounter:
            return LibraryCounter(PREFIX + name, text, labels, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(PREFIX + name, text, registry)

        def counters(name: str, text: str, *labels: str) -> LabelledCounter:
            return LabelledCounter(PREFIX + name, text, labels, registry)

        def histogram(name: str, text: str, bounds: Iterable[float]) -> Histogram:
            return Histogram(PREFIX + name, text, bounds, registry)

        self.requests = counters(
            "requests", "Requests answered, by status (499: the client left first) and strategy.", "code", "strategy"
        )
        self.decisions = counters("decisions", "Choices of a worker for a request with a prompt, by reason.", "reason")
        self.retries = rare("retries", "Requests sent on to another worker, by what went wrong.", "cause")
        self.retries_denied = rare(
            "retries_denied", "Failed requests that were not sent on to another worker, by why not.", "why"
        )
        self.retry_budget = Gauge(
            PREFIX + "retry_budget", "Failed requests that may be sent to another worker now.", registry=registry
        )
        self.ejections = rare("ejections", "Workers left out because they failed where others did not.", "reason")
        self.broken_streams = rare(
            "broken_streams", "Answers that broke off or failed after their first byte, by what went wrong.", "cause"
        )
        self.resumed_streams = rare(
            "resumed_streams", "Streams that went on at another worker, by what went wrong at theirs.", "cause"
        )
        self.decision_seconds = histogram(
            "decision_seconds", "From the arrival of a request with a prompt to its dispatch.", DECISION_BUCKETS
        )
        self.decision_phases = LabelledHistogram(
            PREFIX + "decision_phase_seconds",
            "The parts of that time, of some of the requests whose prompt was read.",
            DECISION_BUCKETS,
            "phase",
            DecisionPhase,
            registry,
        )
        self.request_seconds = histogram(
            "request_seconds", "From a request's arrival to the end of its whole answer.", REQUEST_BUCKETS
        )
        self.ttft = LabelledHistogram(
            PREFIX + "ttft_seconds",
            "From a request's arrival to the first event of its stream with content, by how much was cached.",
            TTFT_BUCKETS,
            "cache",
            CacheUse,
            registry,
        )
        self.predicted_ttft = histogram(
            "predicted_ttft_seconds", "What the decision predicted for the same requests.", TTFT_BUCKETS
        )
        self.ttft_ratio = histogram(
            "ttft_actual_to_predicted_ratio", "For the same requests, the first divided by the second.", RATIO_BUCKETS
        )
        self.tpot = histogram(
            "tpot_seconds", "Mean time between two tokens of a stream, after its first.", TPOT_BUCKETS
        )
        self.matched_blocks = histogram(
            "matched_blocks", "Blocks of the prompt that the chosen worker held, as the router saw it.", BLOCK_BUCKETS
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts routed.")
        self.tokenizer_loaded = Gauge(
            PREFIX + "tokenizer_loaded", "1 once prompts can be read, else 0.", registry=registry
        )
        self.prompts_unread = rare(
            "prompts_unread", "Requests routed by load because their prompt was not read, by why.", "why"
        )
        self.predicted_cached = counter(
            "predicted_cached_tokens", "Cached tokens predicted for the requests whose answers report them."
        )
        self.reported_prompt = counter(
            "reported_prompt_tokens", "Tokens of the prompts whose answers report cached tokens."
        )
        self.actual_cached = counter("actual_cached_tokens", "Cached tokens as the workers' answers report them.")
        self.prefill_saved = counter(
            "prefill_seconds_saved", "Seconds that it would have taken to compute the cached tokens of these prompts."
        )
        self.mispredicted_cached = counters(
            "mispredicted_cached_tokens",
            "Cached tokens that were predicted and not found, or found and not predicted.",
            "direction",
        )
        for direction in OVER, UNDER:
            self.mispredicted_cached.counts[direction] = 0  # a rate needs a series that begins at 0
        self.feed_connects = rare("feed_connects", "Connections made to workers' cache feeds, by outcome.", "outcome")
        self.feed_gaps = rare("feed_gaps", "Times a view was lost and a new snapshot was taken, by why.", "reason")
        self.feed_refusals = rare("feed_refusals", "Feed messages that were not applied, by reason.", "reason")
        self.api_keys = Gauge(PREFIX + "api_keys", "API keys that are known, expired ones included.", registry=registry)
        self.api_keys_unusable = Gauge(
            PREFIX + "api_keys_unusable",
            "1 while the file of API keys cannot be used, so that those read before stay in force; else 0.",
            registry=registry,
        )
        self.unauthorized = rare("unauthorized", "Requests without a valid API key, by what is wrong with it.", "why")
        self.rate_limited = rare("rate_limited", "Requests beyond the rate of their API key, by which rate.", "limit")
        self.rate_peers = Gauge(
            PREFIX + "rate_peers", "Other routers whose use of the API keys' rates is counted here.", registry=registry
        )
        self.tls_handshakes = rare("tls_handshakes", "TLS connections of clients, by version.", "version")
        self.tls_failures = rare(
            "tls_handshake_failures", "Connections to the data port that did not become TLS, by why.", "reason"
        )
        self.certificate_expires = Gauge(
            PREFIX + "tls_certificate_expires_timestamp_seconds",
            "When the certificate in use ends (Unix time), by the port that uses it.",
            ("port",),
            registry=registry,
        )
        self.certificate_unusable = Gauge(
            PREFIX + "tls_certificate_unusable",
            "1 while the files of a certificate cannot be used, so that the one read before stays in use; else 0.",
            ("port",),
            registry=registry,
        )
        self.access_log_dropped = counter(
            "access_log_dropped",
            "Requests that the access log left out because lines could not be written, or not so fast.",
        )
        self.flow_shed = rare(
            "flow_shed", "Requests turned away while all workers were busy, by class and why.", "class", "reason"
        )
        self.flow_left = rare("flow_left", "Requests whose client left while they waited for a worker.", "class")
        self.flow_wait = LibraryHistogram(
            PREFIX + "flow_wait_seconds",
            "How long requests that had to wait for room on a worker did so.",
            ("class",),
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self.loop_lag = histogram("loop_lag_seconds", "How late the event loop runs a timer.", LAG_BUCKETS)
