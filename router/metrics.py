"""The router's metrics. docs/metrics.md describes each; a test holds that document and this module together.

The values of labels are bounded: statuses, enums of causes and reasons, and the workers that exist now. Those are read
from the fleet at each scrape, so that a worker that has been removed leaves no series behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.core.decision import CacheUse
from router.core.fleet import Fleet
from router.core.worker_state import WorkerPhase
from router.discovery.sources import DiscoveryStatus

PREFIX = "kvcluster_router_"

TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0),
)
"""vLLM's buckets, made finer below 1 s: the two histograms can be compared."""
BLOCK_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Every counter and histogram. Gauges are read from the fleet by `FleetCollector`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=tuple(buckets), registry=registry)

        self.requests = counter(
            "requests", "Requests answered, by status (499: the client left first) and strategy.", "code", "strategy"
        )
        self.decisions = counter("decisions", "Choices of a worker for a request with a prompt, by reason.", "reason")
        self.retries = counter("retries", "Requests sent on to another worker, by what went wrong.", "cause")
        self.retries_denied = counter(
            "retries_denied", "Failed requests that were not sent on to another worker, by why not.", "why"
        )
        self.ejections = counter("ejections", "Workers left out because they failed where others did not.", "reason")
        self.broken_streams = counter(
            "broken_streams", "Answers that broke off or failed after their first byte, by what went wrong.", "cause"
        )
        self.resumed_streams = counter(
            "resumed_streams", "Streams that went on at another worker, by what went wrong at theirs.", "cause"
        )
        self.ttft = histogram(
            "ttft_seconds",
            "From a request's arrival to the first event of its stream with content, by how much was cached.",
            TTFT_BUCKETS,
            "cache",
        )
        self.ttft_by = {use: self.ttft.labels(use.value) for use in CacheUse}
        """The series of `ttft`, which a request finds faster here."""
        self.predicted_ttft = histogram(
            "predicted_ttft_seconds", "What the decision predicted for the same requests.", TTFT_BUCKETS
        )
        self.matched_blocks = histogram(
            "matched_blocks", "Blocks of the prompt that the chosen worker held, as the router saw it.", BLOCK_BUCKETS
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts routed.")
        self.tokenizer_loaded = Gauge(
            PREFIX + "tokenizer_loaded", "1 once prompts can be read, else 0.", registry=registry
        )
        self.prompts_unread = counter(
            "prompts_unread", "Requests routed by load because their prompt was not read, by why.", "why"
        )
        self.predicted_cached = counter(
            "predicted_cached_tokens", "Cached tokens predicted for the requests whose answers report them."
        )
        self.reported_prompt = counter(
            "reported_prompt_tokens", "Tokens of the prompts whose answers report cached tokens."
        )
        self.actual_cached = counter("actual_cached_tokens", "Cached tokens as the workers' answers report them.")
        self.feed_connects = counter(
            "feed_connects", "Connections made to workers' cache feeds, by outcome.", "outcome"
        )
        self.feed_gaps = counter("feed_gaps", "Times a view was lost and a new snapshot was taken.")
        self.feed_refusals = counter("feed_refusals", "Feed messages that were not applied, by reason.", "reason")
        self.loop_lag = histogram("loop_lag_seconds", "How late the event loop runs a timer.", LAG_BUCKETS)


class FleetCollector(Collector):
    """Gauges about workers, read from the fleet at each scrape."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily | CounterMetricFamily, ...]:
        def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
            return CounterMetricFamily(PREFIX + name, text, labels=labels)

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(PREFIX + name, text, labels=labels)

        return (
            gauge("workers", "Workers, by how they are routed to.", "state"),
            gauge("worker_states", "Workers, by what they are good for.", "state"),
            gauge("view_age_seconds", "Time since a worker last confirmed what it holds.", "worker"),
            gauge("in_flight", "Requests of this router that are with a worker.", "worker"),
            gauge("worker_blocks", "Blocks a worker holds, as the router sees it.", "worker"),
            counter("worker_requests", "Requests sent to a worker.", "worker"),
            counter("worker_prompt_tokens", "Prompt tokens of its answers that report cached tokens.", "worker"),
            counter("worker_cached_tokens", "Cached tokens as its answers report them.", "worker"),
            gauge("index_blocks", "Different blocks in the index."),
            gauge("sessions", "Sessions that are remembered."),
        )

    def collect(self) -> Iterable[Metric]:
        families = self._families()
        routed, states, age, in_flight, blocks, requests, prompt, cached, index, sessions = families
        counts = dict.fromkeys(("ready", "unmatched", "not_ready"), 0)
        by_state = dict.fromkeys(WorkerPhase, 0)
        del by_state[WorkerPhase.GONE]  # the fleet does not list such a worker
        for worker in self._fleet.workers(self._clock()):
            counts["not_ready" if not worker.ready else "ready" if worker.matching else "unmatched"] += 1
            by_state[worker.state] += 1
            if worker.view_age is not None:
                age.add_metric([worker.worker_id], worker.view_age)
            in_flight.add_metric([worker.worker_id], worker.in_flight)
            blocks.add_metric([worker.worker_id], worker.blocks)
            requests.add_metric([worker.worker_id], worker.requests)
            prompt.add_metric([worker.worker_id], worker.prompt_tokens)
            cached.add_metric([worker.worker_id], worker.cached_tokens)
        for family, numbers in ((routed, counts), (states, by_state)):
            for state, count in numbers.items():
                family.add_metric([str(state)], count)
        index.add_metric([], self._fleet.index_blocks)
        sessions.add_metric([], len(self._fleet.sessions))
        return families


class DiscoveryCollector(Collector):
    """How well discovery knows the workers, read from it at each scrape."""

    def __init__(self, status: Callable[[], DiscoveryStatus]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily, CounterMetricFamily, CounterMetricFamily]:
        return (
            GaugeMetricFamily(PREFIX + "discovery_age_seconds", "Time since the list of workers was last confirmed."),
            CounterMetricFamily(
                PREFIX + "discovery_failures", "Attempts to read or watch the list that failed.", labels=("cause",)
            ),
            CounterMetricFamily(
                PREFIX + "discovery_relists", "Times the whole list was read again.", labels=("reason",)
            ),
        )

    def collect(self) -> Iterable[Metric]:
        age, failures, relists = families = self._families()
        status = self._status()
        if status.age is not None:
            age.add_metric([], status.age)
        for family, counts in ((failures, status.failures), (relists, status.relists)):
            for label, count in counts.items():
                family.add_metric([label], count)
        return families


def total(counter: Counter) -> float:
    """A counter's value, summed over all of its labels."""
    return sum(by_label(counter).values())


def by_label(counter: Counter) -> dict[str, float]:
    """A counter's values by the value of its one label (empty if it has no label)."""
    return {
        "".join(sample.labels.values()): sample.value
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
