"""Figures that other parts of the router keep, read from them at each scrape: about workers, and about discovery."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.core.fleet import Fleet
from router.core.flow import FlowControl
from router.core.view import Trust
from router.core.worker import WorkerStatus
from router.core.worker_state import WorkerPhase
from router.discovery.sources import DiscoveryStatus
from router.metrics.declared import PREFIX

_ROUTED = ("ready", "history", "unmatched", "not_ready")


def _routed(worker: WorkerStatus) -> str:
    """How requests are routed to a worker, one of `_ROUTED`."""
    if not worker.ready:
        return "not_ready"
    if worker.matching:
        return "ready"
    return "history" if worker.history else "unmatched"


class FleetCollector(Collector):
    """Figures about workers, read from the fleet at each scrape.

    The label `worker` is the id that a worker states. Should two state the same, the second one's is its URL.
    """

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily | CounterMetricFamily, ...]:
        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(PREFIX + name, text, labels=labels)

        def counter(name: str, text: str) -> CounterMetricFamily:
            return CounterMetricFamily(PREFIX + name, text, labels=("worker",))

        return (
            gauge("workers", "Workers, by how they are routed to.", "state"),
            gauge("worker_states", "Workers, by what they are good for.", "state"),
            gauge("view_age_seconds", "Time since a worker last confirmed what it holds.", "worker"),
            gauge(
                "view_trust", "1 for how far the view of a worker's cache can be relied on, else 0.", "worker", "trust"
            ),
            gauge("in_flight", "Requests of this router that are with a worker.", "worker"),
            gauge("worker_blocks", "Blocks a worker holds, as the router sees it.", "worker"),
            gauge("worker_running", "Requests that a worker's engine runs, as it last reported.", "worker"),
            gauge("worker_waiting", "Requests that wait in a worker's engine, as it last reported.", "worker"),
            counter("worker_requests", "Requests that this router sent to a worker, each attempt counted."),
            counter("worker_prompt_tokens", "Tokens of a worker's prompts, of answers that report cached tokens."),
            counter("worker_cached_tokens", "Cached tokens as a worker's answers report them."),
            gauge("index_blocks", "Different blocks in the index."),
            gauge("index_bytes", "Memory that the index takes, estimated."),
            gauge("sessions", "Sessions that are remembered."),
        )

    def collect(self) -> Iterable[Metric]:
        families = self._families()
        routed, states, age, trust, in_flight, blocks, running, waiting, requests, prompt, cached, *sizes = families
        counts = dict.fromkeys(_ROUTED, 0)
        by_state = dict.fromkeys(WorkerPhase, 0)
        del by_state[WorkerPhase.GONE]  # the fleet does not list such a worker
        seen: set[str] = set()
        for worker in self._fleet.workers(self._clock()):
            label = [worker.url if worker.worker_id in seen else worker.worker_id]
            seen.update(label)
            counts[_routed(worker)] += 1
            by_state[worker.state] += 1
            if worker.view_age is not None:
                age.add_metric(label, worker.view_age)
            for each in Trust:
                trust.add_metric([*label, each.value], each is worker.trust)
            in_flight.add_metric(label, worker.in_flight)
            blocks.add_metric(label, worker.blocks)
            if worker.load is not None:
                running.add_metric(label, worker.load.running)
                waiting.add_metric(label, worker.load.waiting)
            requests.add_metric(label, worker.requests)
            prompt.add_metric(label, worker.prompt_tokens)
            cached.add_metric(label, worker.cached_tokens)
        for family, numbers in ((routed, counts), (states, by_state)):
            for state, count in numbers.items():
                family.add_metric([str(state)], count)
        figures = (self._fleet.index_blocks, self._fleet.index_bytes, len(self._fleet.sessions))
        for family, figure in zip(sizes, figures, strict=True):
            family.add_metric([], figure)
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


class FlowCollector(Collector):
    """Requests that wait for a worker, read from flow control at each scrape."""

    def __init__(self, flow: FlowControl) -> None:
        self._flow = flow

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily, ...]:
        return (
            GaugeMetricFamily(
                PREFIX + "flow_waiting", "Requests that wait in the router for room on a worker.", labels=("class",)
            ),
            GaugeMetricFamily(PREFIX + "flow_waiting_bytes", "Memory that they take.", labels=("class",)),
        )

    def collect(self) -> Iterable[Metric]:
        waiting, size = families = self._families()
        for queue in self._flow.classes:
            waiting.add_metric((queue.policy.name,), queue.waiting)
            size.add_metric((queue.policy.name,), queue.size)
        return families
