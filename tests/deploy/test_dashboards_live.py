"""Every query of every panel and every alert, evaluated by a real Prometheus that scrapes a real controller, routers
and workers in which everything happens that metrics tell of; and their values beside sums over what the clients were
answered, and over what the API server saw.

The targets carry the labels that Kubernetes' service discovery would give them, and go through the rules of
docs/dashboards.md. There are two routers, so that a figure that is added up over routers by mistake shows.

Not covered: times (the histograms are only counted), discovery by EndpointSlices (tests/router/discovery), Grafana.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.monitoring.alerts import ALERTS, rule_groups
from deploy.monitoring.dashboards import DASHBOARDS, DOCUMENT
from deploy.monitoring.panels import Panel, Query
from tests.deploy import prometheus
from tests.deploy.scraped import MODEL, NAME, NAMESPACE, REFUSED, Run, running
from tests.deploy.test_dashboards import metric_names
from tests.kube.operator.support import OPERATOR
from tests.processes import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        prometheus.binary() is None, reason="Prometheus is not installed (Debian: apt-get install prometheus)"
    ),
]

WINDOW = 60.0
"""Seconds over which a panel must show something."""
NOT_HERE = {
    "Discovery problems": "workers are listed in a file, and only EndpointSlices are listed again or fail",
    "Credentials that cannot be used": "no router of this run has API keys or a certificate of its own",
    "Time left of certificates": "no router of this run has a certificate of its own",
}
"""Panels whose queries return nothing in this run, and why."""
TROUBLE = {"KVClusterWorkerUnreachable", "KVClusterWorkerEjected", "KVClusterWorkerUnmatched", "KVClusterDegraded"}
"""Alerts that must fire in the trouble of this run, if they do not wait."""
OF_THE_BED = {
    "KVClusterNotReady": "the fake API server has no nodes, so the controller's KVCluster has no pods",
    "KVClusterTTFTMispredicted": "times are those of the machine that runs the tests, not of the profile",
}
"""Alerts that may fire though nothing is wrong, and why."""

QUERIES = [found for board in DASHBOARDS.values() for found in board.expressions]


def scrape_config(run: Run, rules: Path) -> dict[str, Any]:
    found = re.search(r"<!-- scrape: .*?```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    [job] = yaml.safe_load(found[1])["scrape_configs"]
    del job["kubernetes_sd_configs"]
    job["static_configs"] = run.targets()
    every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    return {"global": every, "rule_files": [str(rules)], "scrape_configs": [job]}


def rules_that_do_not_wait(folder: Path) -> Path:
    """The chart's rules, but an alert fires as soon as its expression is true."""
    groups = [
        {**group, "rules": [{key: value for key, value in rule.items() if key != "for"} for rule in group["rules"]]}
        for group in rule_groups()
    ]
    file = folder / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": groups}))
    return file


def substituted(expression: str) -> str:
    """A query as Grafana sends it, for one namespace and one KVCluster."""
    values = {"__rate_interval": "5s", "namespace": NAMESPACE, "kvcluster": NAME, "worker": ".*", "model": ".*"}
    for variable, value in values.items():
        expression = expression.replace(f"${variable}", value)
    assert "$" not in expression, expression
    return expression


def in_total(title: str, legend: str = "") -> str:
    """The query of a panel with what counters have counted in place of what they count a second."""
    found = [query for panel, query in QUERIES if panel.title == title and legend in query.legend]
    return substituted(re.sub(r"rate\(([^\[]+)\[\$__rate_interval\]\)", r"\1", found[0].expression))


async def test_every_query_returns_what_happened(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        config = scrape_config(run, rules_that_do_not_wait(tmp_path))
        async with prometheus.running(config, tmp_path) as server:
            missing = await shown(server, [(panel, query) for panel, query in QUERIES if not panel.quiet])
            assert not missing, missing
            assert await server.alerts() <= OF_THE_BED.keys(), "nothing is wrong"
            await run.rest()
            await server.has_scraped_since_now()
            await compare_tokens(server, run)
            run.ask_on()
            await run.trouble()
            missing = await shown(server, [(panel, query) for panel, query in QUERIES if panel.quiet])
            assert {title for title, _ in missing} == NOT_HERE.keys(), sorted(missing)
            await eventually(lambda: fire(server, TROUBLE), "what is wrong is said")
            run.api.server.faults.clear()  # so that what it counted of them is final
            await run.rest()
            await server.has_scraped_since_now()
            await compare_requests(server, run)
            await compare_with_the_api_server(server, run)
            await check_names(server, run)
            health = await server.rules()
            assert {rule["health"] for rule in health} == {"ok"}, [rule for rule in health if rule["health"] != "ok"]
            alerts = [alert for rule in health for alert in rule.get("alerts", ())]
            texts = [text for alert in alerts for text in alert["annotations"].values()]
            assert texts
            assert not [text for text in texts if "error" in text.lower() or "no value" in text]


async def shown(server: prometheus.Prometheus, queries: list[tuple[Panel, Query]]) -> set[tuple[str, str]]:
    """(panel, query) of what shows nothing, after waiting for it."""
    empty = {(panel.title, substituted(query.expression)) for panel, query in queries}

    async def all_show_data() -> bool:
        for title, expression in sorted(empty):
            if await server.points(expression, WINDOW):
                empty.discard((title, expression))
        return not {title for title, _ in empty} - NOT_HERE.keys()

    with suppress(AssertionError):
        await eventually(all_show_data, "every panel shows data", 60)
    return empty


async def fire(server: prometheus.Prometheus, expected: set[str]) -> bool:
    return expected <= await server.alerts()


async def compare_tokens(server: prometheus.Prometheus, run: Run) -> None:
    """Tokens, as long as no worker has failed: of a stream that goes on elsewhere, no client learns them all."""
    clients = run.clients
    answered = [answer for answer in clients.answers if answer.cached is not None]
    prompt, cached = (sum(part) for part in zip(*((a.usage["prompt_tokens"], a.cached) for a in answered), strict=True))
    assert await server.value(in_total("Hit rate")) == pytest.approx(cached / prompt)
    assert await server.value(in_total("Hit rate: predicted and actual", "engines")) == pytest.approx(cached / prompt)
    hits = await server.values(in_total("Hit rate by worker", "worker"), "worker")
    prompts = clients.by(lambda answer: answer.usage["prompt_tokens"], answered)
    tokens = clients.by(lambda answer: answer.cached or 0, answered)
    assert hits == pytest.approx({worker: tokens[worker] / prompts[worker] for worker in prompts})
    generated = clients.by(lambda answer: answer.usage["completion_tokens"], answered)
    assert await server.values(in_total("Tokens generated"), "pod") == generated
    assert await server.value(f"sum ({in_total('Finished requests')})") == len(answered)
    streamed = sum(answer.streamed for answer in answered)
    count = "sum (kvcluster_router_ttft_seconds_count) == sum (kvcluster_router_predicted_ttft_seconds_count)"
    assert await server.value(count) == streamed
    attempts = sum(answer.attempts for answer in clients.answers)  # a refusal may be asked of a second worker
    assert await server.value(f"sum ({in_total('Requests by worker', 'worker')})") == attempts


async def compare_requests(server: prometheus.Prometheus, run: Run) -> None:
    answers = run.clients.answers
    statuses = Counter(str(answer.status) for answer in answers)
    assert await server.values(in_total("Requests by status"), "code") == statuses
    assert await server.value(in_total("Requests")) == len(answers)
    failed = sum(number for code, number in statuses.items() if code.startswith("5"))
    assert await server.value(in_total("Failed requests")) == pytest.approx(failed / len(answers))
    listed, failing = 3 + len(run.failing) + 2, len(run.failing)
    shown = await server.value(f"sum ({in_total('Workers by state')})")
    assert listed <= shown <= listed + failing, "once, but for what the routers see in different states"
    assert await server.value(f"sum ({in_total('Requests in flight, by worker')})") == 0


async def compare_with_the_api_server(server: prometheus.Prometheus, run: Run) -> None:
    requests = [each for each in run.api.backend.requests if each.user == OPERATOR]
    refused = sum(each.status == 422 for each in requests)
    assert refused
    assert await server.values(in_total("Failed writes"), "kind") == {"ConfigMap": refused}
    assert await server.values(in_total("Drift repaired"), "kind") == {"Service": 1}
    described = in_total("Conditions that are not as they should be").replace(f'kvcluster=~"{NAME}"', 'kvcluster=~".+"')
    assert (await server.values(f"count by (kvcluster) ({described})", "kvcluster")).keys() == {NAME, REFUSED}


async def check_names(server: prometheus.Prometheus, run: Run) -> None:
    """The labels of the series, the choices of the variables, and that every metric of a query exists."""
    asked = set().union(*(metric_names(query.expression) for panel, query in QUERIES if panel.title not in NOT_HERE))
    described = await server.families()
    # OpenMetrics describes a counter without its suffix.
    assert not {name for name in asked if not {name, name.removesuffix("_total")} & described}
    expected = {
        "namespace": {NAMESPACE},
        "kvcluster": {NAME},
        "worker": {worker.name for worker in run.local.workers},
        "model": {MODEL},
    }
    for variable in (variable for board in DASHBOARDS.values() for variable in board.variables):
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable.query)
        assert found is not None
        values = await server.label_values(substituted(found[1]), found[2])
        assert values >= expected[variable.name]
        assert values - expected[variable.name] <= {REFUSED}
    memory = "process_resident_memory_bytes"
    assert await server.label_values(memory, "component") == {"controller", "router", "worker"}
    assert await server.label_values("ALERTS", "alertname") <= set(ALERTS)
