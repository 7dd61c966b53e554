"""The agent's own metrics: docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcache.feed import Tier
from worker.agent.agent import Agent
from worker.agent.core.blocks import DropReason
from worker.agent.core.follower import Reset
from worker.agent.core.groups import EVENT_TYPES
from worker.agent.prompts import Agreement
from worker.agent.rank import REPLAY_OUTCOMES

PREFIX = "kvcluster_agent_"

_Name = TypeVar("_Name", bound=str)


class AgentCollector(Collector):
    """Reads the agent's state at each scrape. What is about engines is added up over all data-parallel ranks, and a
    state is that of all."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterable[Metric]:
        agent, ranks = self._agent, self._agent.ranks
        followers = [rank.view.follower for rank in ranks]
        blocks, feeds = [follower.blocks for follower in followers], [rank.view.feed for rank in ranks]
        yield _gauge("engine_up", "1 while the engine answers.", not agent.engine_problem)
        yield _gauge("ranks", "Data-parallel ranks of the engine.", len(ranks))
        yield _gauge("following", "1 while the engine's events are followed.", not agent.events_problem)
        yield _gauge("complete", "1 when every block of the engine was seen being stored.", agent.complete)
        prompts = GaugeMetricFamily(
            PREFIX + "prompts",
            "1 for what is known of the engine's prompts: equal to the routers' or not.",
            labels=["state"],
        )
        for state in Agreement:
            prompts.add_metric([state.value], float(state is agent.agreement))
        yield prompts
        adapters = GaugeMetricFamily(
            PREFIX + "adapters", "LoRA adapters that the engine has, and wanted ones that it has not.", labels=["state"]
        )
        loaded, missing = agent.keeper.state
        adapters.add_metric(["loaded"], float(len(loaded)))
        adapters.add_metric(["missing"], float(len(missing)))
        yield adapters
        yield _counter("adapter_failures", "Adapters that the engine did not load or unload.", agent.keeper.failures)
        yield _gauge("blocks", "Blocks published, each physical one counted.", sum(each.physical for each in blocks))
        tiers = GaugeMetricFamily(PREFIX + "tier_blocks", "Copies of blocks published, by tier.", labels=["tier"])
        for tier in (Tier.CPU, Tier.DISK):
            tiers.add_metric([tier.value], float(sum(each.held_below(tier) for each in blocks)))
        yield tiers
        age = GaugeMetricFamily(PREFIX + "last_event_age_seconds", "Since the last batch of events.")
        if times := [rank.last_event_at for rank in ranks if rank.last_event_at is not None]:
            age.add_metric([], agent.clock() - max(times))
        yield age
        events = _totals(EVENT_TYPES, (each.events for each in blocks))
        yield _counters("events", "Events of the engine.", "type", events)
        yield _counters(
            "dropped_blocks",
            "Blocks that the engine stored and that are not published.",
            "reason",
            _totals(DropReason, (each.dropped for each in blocks)),
        )
        unknown = sum(each.unknown_removals for each in blocks)
        yield _counter("unknown_removals", "Removals of blocks that were not published.", unknown)
        gaps = sum(follower.gaps for follower in followers)
        yield _counter("gaps", "Times batches of the engine were missed.", gaps)
        yield _counters(
            "replays",
            "Requests for missed batches.",
            "outcome",
            _totals(REPLAY_OUTCOMES, (rank.replays for rank in ranks)),
        )
        yield _counters("epochs", "Epochs begun.", "reason", _totals(Reset, (rank.view.resets for rank in ranks)))
        subscribers = sum(feed.subscribers for feed in feeds)
        yield _gauge("feed_subscribers", "Routers that read the cache feed now.", subscribers)
        resets = sum(feed.resets for feed in feeds)
        yield _counter("feed_resets", "Times a subscriber was told to take a new snapshot.", resets)


def _totals(names: Iterable[_Name], counts: Iterable[Mapping[_Name, int]]) -> Mapping[str, int]:
    """By name (those of an enum by its values), the sum of what the mappings hold."""
    several = tuple(counts)
    return {str(name): sum(each[name] for each in several) for name in names}


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, float(value))


def _counters(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], float(number))
    return family
