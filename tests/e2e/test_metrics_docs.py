"""docs/metrics.md and the code name the same metrics, with the same types and labels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from controller.metrics import ClusterCollector
from controller.metrics import Metrics as ControllerMetrics
from controller.reconcile.inventory import Inventory
from kvcache.tokens.tokenizer import load_tokenizer
from router.discovery.sources import StaticDiscovery
from router.main import Router
from router.settings import Settings as RouterSettings
from worker.agent.agent import Agent
from worker.agent.main import make_app
from worker.agent.prompts import Expected
from worker.agent.settings import Settings as AgentSettings
from worker.emulator.generators import make_generator
from worker.main import Worker
from worker.settings import Settings as WorkerSettings

Described = dict[str, tuple[str, frozenset[str]]]
"""Name -> type and labels."""

ENGINE = {"engine", "model_name"}
CONFIGURATION = frozenset({"(configuration)"})


def documented(prefix: str) -> Described:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `([\w:]+)` \| (\w+) \|([^|]*)\|", text, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows), "a metric is documented twice"
    return {
        name: (kind, frozenset(filter(None, labels.strip().split(", "))))
        for name, kind, labels in rows
        if name.startswith(prefix)
    }


def exported(families: Iterable[Metric], prefix: str) -> Described:
    found: Described = {}
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name.startswith(prefix) and not name.endswith("_created"):
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[name] = (family.type, frozenset(labels))
    return found


async def worker_metrics() -> list[Metric]:
    settings = WorkerSettings()
    tokenizer = load_tokenizer(settings.tokenizer)
    worker = Worker(settings, tokenizer, make_generator("sampler", tokenizer, seed=0, mean_tokens=10), 8100)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(worker.app), base_url="http://worker") as client:
        text = (await client.get("/metrics")).text
    worker.close()
    return list(text_string_to_metric_families(text))


async def test_the_routers_metrics() -> None:
    router = Router(RouterSettings(), StaticDiscovery([]))
    # A family with labels has no sample before the first event, so its labels are read off its declaration.
    families = list(router.registry.collect())
    found = exported(families, "kvcluster_router_")
    for metric in vars(router.metrics).values():
        (family,) = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, frozenset(metric._labelnames))
    for family in (*router.fleet_metrics.describe(), *router.discovery_metrics.describe()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, frozenset(family._labelnames))
    await router.close()
    assert documented("kvcluster_router_") == found


async def test_the_agents_metrics() -> None:
    agent = Agent(AgentSettings(), lambda: Expected("-", ()), 8101)
    transport = httpx.ASGITransport(make_app(agent))
    async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
        text = (await client.get("/metrics")).text
    agent.close()
    assert documented("kvcluster_agent_") == exported(text_string_to_metric_families(text), "kvcluster_agent_")


async def test_the_workers_metrics() -> None:
    families = await worker_metrics()
    assert documented("kvcluster_worker_") == exported(families, "kvcluster_worker_")
    expected = documented("vllm:")
    found = exported(families, "vllm:")
    assert expected.keys() == found.keys()
    for name, (kind, labels) in expected.items():
        assert found[name][0] == kind, name
        if labels != CONFIGURATION:
            assert found[name][1] == labels | ENGINE, name


def test_the_controllers_metrics() -> None:
    registry = CollectorRegistry()
    metrics, clusters = ControllerMetrics(registry), ClusterCollector(Inventory(), lambda: 0)
    found: Described = {}
    for declared in (*vars(metrics).values(), clusters):
        for family in declared.describe():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = family._labelnames if declared is clusters else declared._labelnames
            found[name] = (family.type, frozenset(labels))
    assert documented("kvcluster_controller_") == found
