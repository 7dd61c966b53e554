"""The dashboards as documents: every panel says what it shows, and asks for metrics that exist.

Not covered: whether queries return data (test_dashboards_live.py), and what Grafana draws.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.api.load import validate_manifest
from controller.objects.monitoring import build_pod_monitors
from controller.objects.names import Cluster, Release
from deploy.helm.dashboards import DOCUMENT, FLEET, ROOT, load, panels, queries, with_panels

METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
RATE_INTERVAL = "1m"


def metric_names(expression: str) -> set[str]:
    """Names of the families a query asks for."""
    found = re.findall(r"\b(?:kvcluster_|vllm:|process_)\w+", expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


@pytest.fixture(scope="module")
def fleet() -> dict[str, Any]:
    return load(FLEET)


def test_every_panel_has_a_title_a_description_a_unit_and_the_chosen_source(fleet):
    titles = [panel["title"] for panel in panels(fleet)]
    assert len(set(titles)) == len(titles)
    for panel in panels(fleet):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_panels_do_not_overlap(fleet):
    assert len({panel["id"] for panel in fleet["panels"]}) == len(fleet["panels"])
    cells: list[set[tuple[int, int]]] = []
    for panel in fleet["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells.append({(x, y) for x in columns for y in rows})
    assert not any(one & other for one, other in combinations(cells, 2))


def test_every_metric_is_documented(fleet):
    documented = set(re.findall(r"^\| `([\w:]+)` \|", METRICS, re.MULTILINE))
    asked = set().union(*(metric_names(query.expression) for query in queries(fleet)))
    assert len(asked) > 20
    assert not {name for name in asked - documented if not name.startswith("process_")}


def test_queries_keep_to_the_chosen_clusters(fleet):
    for query in queries(fleet):
        chosen = query.expression.count('{namespace=~"$namespace", kvcluster=~"$kvcluster"')
        scoped = re.findall(r"\b(?:kvcluster_router_|vllm:)\w+", query.expression)
        assert chosen == len(scoped), f"{query.panel}: {query.expression}"


def test_labels_in_the_legend_are_labels_of_the_result(fleet):
    for query in queries(fleet):
        labels = set(re.findall(r"{{(\w+)}}", query.legend))
        groups = {name.strip() for by in re.findall(r"by \(([^)]*)\)", query.expression) for name in by.split(",")}
        assert labels <= groups, f"{query.panel}: {query.legend}"


def test_the_documents_list_of_panels_is_the_dashboards():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_panels(text) == text, "run: python -m deploy.helm.dashboards"


def promtool(*arguments: str) -> None:
    """`promtool check`, where it is installed."""
    executable = shutil.which("promtool")
    if executable is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    checked = subprocess.run([executable, "check", *arguments], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_can_parse_every_query(fleet, tmp_path: Path):
    rules = [
        {"record": f"query:{number}", "expr": query.expression.replace("$__rate_interval", RATE_INTERVAL)}
        for number, query in enumerate(queries(fleet))
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("rules", "--lint-fatal", str(file))


def test_the_prometheus_operator_is_told_to_set_the_same_labels():
    head = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}}
    manifest = validate_manifest({**head, "spec": {"monitoring": {"podMonitor": True}}})
    cluster = Cluster("rag", "shop", "uid", manifest.spec, Release("kvcluster:test"))
    endpoints = [
        endpoint for monitor in build_pod_monitors(cluster) for endpoint in monitor["spec"]["podMetricsEndpoints"]
    ]
    assert len(endpoints) == 2
    [job] = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[0])[
        "scrape_configs"
    ]
    [renamed] = job["metric_relabel_configs"]
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == {"namespace", "pod", "component", "kvcluster"}
    for endpoint in endpoints:
        # The operator sets the others by itself.
        assert {rule["targetLabel"] for rule in endpoint["relabelings"]} == documented - {"namespace", "pod"}
        [rule] = endpoint["metricRelabelings"]
        assert (rule["regex"], rule["replacement"]) == (renamed["regex"], renamed["replacement"])
