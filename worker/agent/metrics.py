"""The agent's own metrics: docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.agent.agent import REPLAY_OUTCOMES, Agent
from worker.agent.core.blocks import EVENT_TYPES, DropReason
from worker.agent.core.follower import Reset
from worker.agent.prompts import Agreement

PREFIX = "kvcluster_agent_"


class AgentCollector(Collector):
    """Reads the agent's state at each scrape."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterable[Metric]:
        agent, view, follower = self._agent, self._agent.view, self._agent.view.follower
        blocks, feed = follower.blocks, view.feed
        yield _gauge("engine_up", "1 while the engine answers.", not agent.engine_problem)
        yield _gauge("following", "1 while the engine's events are followed.", not agent.events_problem)
        yield _gauge("complete", "1 when every block of the engine was seen being stored.", follower.complete)
        prompts = GaugeMetricFamily(
            PREFIX + "prompts",
            "1 for what is known of the engine's prompts: equal to the routers' or not.",
            labels=["state"],
        )
        for state in Agreement:
            prompts.add_metric([state.value], float(state is agent.agreement))
        yield prompts
        yield _gauge("blocks", "Blocks published, each physical one counted.", blocks.physical)
        age = GaugeMetricFamily(PREFIX + "last_event_age_seconds", "Since the last batch of events.")
        if agent.last_event_at is not None:
            age.add_metric([], agent.clock() - agent.last_event_at)
        yield age
        yield _counters("events", "Events of the engine.", "type", {name: blocks.events[name] for name in EVENT_TYPES})
        yield _counters(
            "dropped_blocks",
            "Blocks that the engine stored and that are not published.",
            "reason",
            {reason.value: blocks.dropped[reason] for reason in DropReason},
        )
        yield _counter("unknown_removals", "Removals of blocks that were not published.", blocks.unknown_removals)
        yield _counter("gaps", "Times batches of the engine were missed.", follower.gaps)
        yield _counters(
            "replays",
            "Requests for missed batches.",
            "outcome",
            {name: agent.replays[name] for name in REPLAY_OUTCOMES},
        )
        yield _counters("epochs", "Epochs begun.", "reason", {reason.value: view.resets[reason] for reason in Reset})
        yield _gauge("feed_subscribers", "Routers that read the cache feed now.", feed.subscribers)
        yield _counter("feed_resets", "Times a subscriber was told to take a new snapshot.", feed.resets)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, float(value))


def _counters(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], float(number))
    return family
