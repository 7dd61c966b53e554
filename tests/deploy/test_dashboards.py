"""The dashboards as documents: what is in the chart is what the code makes, Grafana's types hold it, every panel says
what it shows and what to do, and asks for metrics that exist.

Not covered: whether queries return data, and the right figures (test_dashboards_live.py), and what Grafana draws.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as types
from grafana_foundation_sdk.models import units

from controller.api.load import validate_manifest
from controller.objects.desired import desired_objects
from controller.objects.monitoring import build_pod_monitors
from controller.objects.names import Cluster, Release
from deploy.monitoring.dashboards import DASHBOARDS, DOCUMENT, ROOT, files, with_panels
from deploy.monitoring.panels import Dashboard, as_json

METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
RATE_INTERVAL = "1m"
OWN = {"ALERTS"}
"""What Prometheus itself makes."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEAD = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}}
OF_EVERY_ROUTER = (
    "view_age_seconds|view_trust|worker_blocks|worker_running|worker_waiting|workers|worker_states|index_blocks"
)
"""Gauges of the routers that each of them has of the same workers."""


def metric_names(expression: str) -> set[str]:
    """Names of the families a query asks for."""
    found = re.findall(r"\b(?:kvcluster_|vllm:|process_)\w+", expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


@pytest.fixture(params=DASHBOARDS.values(), ids=DASHBOARDS.keys())
def board(request: pytest.FixtureRequest) -> Dashboard:
    found: Dashboard = request.param
    return found


@pytest.fixture
def imported(board: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    found: dict[str, Any] = json.loads(as_json(board))
    return found


def test_the_chart_has_the_dashboards_of_the_code():
    [folder] = {file.parent for file in files()}
    assert {file: file.read_text(encoding="utf-8") for file in folder.iterdir()} == files(), (
        "run: python -m deploy.monitoring.dashboards"
    )


def test_grafanas_types_hold_everything(imported: dict[str, Any]):
    register_default_plugins()
    decoded = types.Dashboard.from_json(imported)
    assert json.loads(json.dumps(decoded, cls=JSONEncoder)) == imported


def test_it_can_be_imported(board: Dashboard, imported: dict[str, Any]):
    """No id, so that it is new to any Grafana; a uid of its own, so that links and later imports find it; no data
    source but the one that the reader chooses; only variables that there are."""
    assert imported.get("id") is None
    assert "__inputs" not in imported
    assert re.fullmatch(r"[a-z-]{1,40}", imported["uid"])
    assert imported["schemaVersion"] == 38
    assert imported["tags"] == ["kvcluster"]
    source, *variables = imported["templating"]["list"]
    assert (source["type"], source["name"], source["query"]) == ("datasource", "datasource", "prometheus")
    names = [variable["name"] for variable in variables]
    for index, variable in enumerate(variables):
        assert variable["datasource"] == SOURCE
        assert set(re.findall(r"\$(\w+)", variable["query"]["query"])) <= set(names[:index]), "in the order of use"
    used = set(re.findall(r"\$(\w+)", " ".join(query.expression for _, query in board.expressions)))
    assert used == {*names, "__rate_interval"}


def test_uids_differ_and_every_dashboard_leads_to_the_others_and_to_the_runbooks():
    assert len({board.uid for board in DASHBOARDS.values()}) == len(DASHBOARDS)
    for board in DASHBOARDS.values():
        others, runbooks = json.loads(as_json(board))["links"]
        assert others | {"tags": ["kvcluster"], "includeVars": True, "keepTime": True} == others
        assert runbooks["url"].startswith("https://runbooks.example.com/")


def test_every_panel_says_what_it_shows_and_what_to_do(board: Dashboard, imported: dict[str, Any]):
    titles = [panel.title for panel in board.panels]
    assert len(set(titles)) == len(titles)
    known = {value for name, value in vars(units).items() if not name.startswith("_")}
    drawn = [panel for panel in imported["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in drawn] == titles
    for panel, shown in zip(board.panels, drawn, strict=True):
        assert panel.shows.endswith("."), panel.title
        assert not panel.act or panel.act.endswith("."), panel.title
        assert not panel.quiet or panel.quiet.endswith("."), panel.title
        if panel.bounds or panel.alerts:
            assert panel.act, f"{panel.title}: what to do when it is bad"
        assert panel.unit in known, panel.title
        assert shown["description"] == f"{panel.shows} {panel.act}".strip()
        assert shown["fieldConfig"]["defaults"]["unit"] == panel.unit
        assert [target["expr"] for target in shown["targets"]] == [query.expression for query in panel.queries]
        for source in (shown["datasource"], *(target["datasource"] for target in shown["targets"])):
            assert source == SOURCE, panel.title


def test_panels_do_not_overlap(imported: dict[str, Any]):
    panels = imported["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: list[set[tuple[int, int]]] = []
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells.append({(x, y) for x in columns for y in rows})
    assert not any(one & other for one, other in combinations(cells, 2))


def test_every_metric_is_documented(board: Dashboard):
    documented = set(re.findall(r"^\| `([\w:]+)` \|", METRICS, re.MULTILINE))
    asked = set().union(*(metric_names(query.expression) for _, query in board.expressions))
    assert len(asked) > 10
    assert not {name for name in asked - documented if not name.startswith("process_")}


def test_queries_keep_to_what_is_chosen(board: Dashboard):
    chosen = 'namespace=~"$namespace", kvcluster=~"$kvcluster"'
    for panel, query in board.expressions:
        for selector in re.findall(r"\b(?:kvcluster_|vllm:|process_)\w+(?:\{[^}]*\})?", query.expression):
            name = re.match(r"[\w:]+", selector)
            assert name is not None
            if name[0].startswith("kvcluster_controller_") and name[0] != "kvcluster_controller_condition":
                continue  # one controller for all
            if 'component="controller"' in selector:
                continue
            assert chosen in selector, f"{panel.title}: {selector}"
            if name[0].startswith("vllm:") and board is DASHBOARDS["engine"]:
                assert 'pod=~"$worker", model_name=~"$model"' in selector, f"{panel.title}: {selector}"


def test_nothing_is_multiplied_by_the_number_of_routers(board: Dashboard):
    """What every router reports of the same worker is never added up over routers."""
    for panel, query in board.expressions:
        found = re.findall(
            rf"(\w+)(?: by \(([^)]*)\))? ?\((?:rate\()?kvcluster_router_(?:{OF_EVERY_ROUTER})\b", query.expression
        )
        asked = re.findall(rf"kvcluster_router_(?:{OF_EVERY_ROUTER})\b", query.expression)
        assert len(found) == len(asked), f"{panel.title}: {query.expression}"
        for function, labels in found:
            assert function in ("max", "min", "avg") or "pod" in labels.split(", "), f"{panel.title}: {function}"


def test_labels_in_the_legend_are_labels_of_the_result(board: Dashboard):
    for panel, query in board.expressions:
        labels = set(re.findall(r"{{(\w+)}}", query.legend))
        groups = {name.strip() for by in re.findall(r"by \(([^)]*)\)", query.expression) for name in by.split(",")}
        assert labels <= groups, f"{panel.title}: {query.legend}"


def test_the_documents_list_of_panels_is_the_dashboards():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_panels(text) == text, "run: python -m deploy.monitoring.dashboards"


def promtool(*arguments: str) -> None:
    """`promtool`, where it is installed."""
    executable = shutil.which("promtool")
    if executable is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    checked = subprocess.run([executable, *arguments], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_can_parse_every_query(tmp_path: Path):
    expressions = [query.expression for board in DASHBOARDS.values() for _, query in board.expressions]
    rules = [
        {"record": f"query:{number}", "expr": expression.replace("$__rate_interval", RATE_INTERVAL)}
        for number, expression in enumerate(expressions)
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "--lint-fatal", str(file))


def job() -> dict[str, Any]:
    """The documented job for a plain Prometheus."""
    text = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[0]
    [found] = yaml.safe_load(text)["scrape_configs"]
    return dict(found)


@pytest.mark.parametrize(("engine", "ports"), [("emulator", {8100}), ("vllm", {8100, 8101})], ids=["emulator", "vllm"])
def test_with_and_without_the_operator_the_same_ports_are_scraped(engine: str, ports: set[int]):
    spec = {
        "monitoring": {"podMonitor": True, "scrapeAnnotations": True},
        "engine": {"type": engine, "image": "vllm/vllm-openai:v0.32.0"} if engine == "vllm" else {},
        "model": {"name": "m"},
    }
    manifest = validate_manifest({**HEAD, "spec": spec})
    objects = desired_objects(Cluster("rag", "shop", "uid", manifest.spec, Release("kvcluster:test")))
    by_monitor = {
        (item["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"], endpoint["port"])
        for item in objects
        if item["kind"] == "PodMonitor"
        for endpoint in item["spec"]["podMetricsEndpoints"]
    }
    keep = job()["relabel_configs"][0]
    kept = {}
    for item in objects:
        if item["kind"] != "Deployment":
            continue
        pod = item["spec"]["template"]
        labels, annotations = pod["metadata"]["labels"], pod["metadata"]["annotations"]
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
            for port in container.get("ports", ()):
                component = labels["app.kubernetes.io/component"]
                head = (labels["app.kubernetes.io/name"], annotations["prometheus.io/scrape"], component, port["name"])
                if re.fullmatch(keep["regex"], ";".join(head)):
                    kept[component, port["name"]] = port["containerPort"]
    assert kept.keys() == by_monitor
    assert set(kept.values()) == {9000, *ports}


def test_the_prometheus_operator_is_told_to_set_the_same_labels():
    manifest = validate_manifest({**HEAD, "spec": {"monitoring": {"podMonitor": True}}})
    cluster = Cluster("rag", "shop", "uid", manifest.spec, Release("kvcluster:test"))
    endpoints = [
        endpoint for monitor in build_pod_monitors(cluster) for endpoint in monitor["spec"]["podMetricsEndpoints"]
    ]
    assert len(endpoints) == 2
    [renamed] = job()["metric_relabel_configs"]
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == {"namespace", "pod", "component", "kvcluster"}
    for endpoint in endpoints:
        # The operator sets the others by itself.
        assert {rule["targetLabel"] for rule in endpoint["relabelings"]} == documented - {"namespace", "pod"}
        [rule] = endpoint["metricRelabelings"]
        assert (rule["regex"], rule["replacement"]) == (renamed["regex"], renamed["replacement"])
