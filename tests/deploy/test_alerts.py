"""Alerts: each fires when what it is about happens, alone, and none fires while all is well, without traffic, after all
routers have restarted, or where a metric does not exist.

Prometheus itself (`promtool test rules`) evaluates the rules over series made here, of two routers, three workers and a
controller. Not covered: series of real processes (test_dashboards_live.py), and the chart's object (test_chart.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from deploy.monitoring.alerts import ALERTS, DOCUMENT, FILE, RUNBOOK_FOLDER, rule_groups, with_alerts
from deploy.monitoring.dashboards import DASHBOARDS, ROOT
from deploy.monitoring.panels import RUNBOOKS

TROUBLE = 270
"""The minute in which something happens. Before it there is history enough for the alert about the hit rate."""
REST = 90
"""Minutes after it."""
MINUTES = TROUBLE + REST

Series = dict[str, str]
"""Series -> values, as promtool writes them, one a minute."""


def counter(a_minute: float, later: float | None = None) -> str:
    """A counter that grows so much a minute, and so much from the trouble on."""
    after = "" if later is None else f" {a_minute * TROUBLE:g}+{later:g}x{REST}"
    return f"0+{a_minute:g}x{TROUBLE if after else MINUTES}{after}"


def gauge(value: float, later: float | None = None) -> str:
    return f"{value:g}x{TROUBLE}" + f" {value if later is None else later:g}x{REST}"


def until_the_trouble(values: str) -> str:
    """A series that ends when something happens."""
    return f"{values.partition('x')[0]}x{TROUBLE} stale"


def named(metric: str, **labels: str) -> str:
    matchers = ", ".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    return f"{metric}{{{matchers}}}"


def router(metric: str, pod: str, **labels: str) -> str:
    return named(f"kvcluster_router_{metric}", namespace="shop", kvcluster="rag", pod=pod, **labels)


def controller(metric: str, **labels: str) -> str:
    return named(f"kvcluster_controller_{metric}", **({"namespace": "system", "pod": "c0"} | labels))


def of_router(pod: str, tokens: float = 60_000) -> Series:
    """A router whose hit rate is 60 %, and which predicts it well."""
    series = {
        named("up", component="router", namespace="shop", kvcluster="rag", pod=pod): gauge(1),
        router("requests_total", pod, code="200"): counter(tokens / 1000),
        router("reported_prompt_tokens_total", pod): counter(tokens),
        router("actual_cached_tokens_total", pod): counter(0.6 * tokens),
        router("mispredicted_cached_tokens_total", pod, direction="over"): counter(0.02 * tokens),
        router("mispredicted_cached_tokens_total", pod, direction="under"): counter(0.01 * tokens),
        router("ttft_actual_to_predicted_ratio_bucket", pod, le="0.5"): counter(0),
        router("ttft_actual_to_predicted_ratio_bucket", pod, le="1"): counter(tokens / 2000),
        router("ttft_actual_to_predicted_ratio_bucket", pod, le="2"): counter(tokens / 1000),
        router("ttft_actual_to_predicted_ratio_bucket", pod, le="4"): counter(tokens / 1000),
        router("ttft_actual_to_predicted_ratio_bucket", pod, le="+Inf"): counter(tokens / 1000),
        router("ttft_actual_to_predicted_ratio_count", pod): counter(tokens / 1000),
        router("retries_denied_total", pod, why="budget"): counter(0),
        router("broken_streams_total", pod, cause="cut"): counter(0),
        router("tokenizer_loaded", pod): gauge(1),
        router("discovery_age_seconds", pod): gauge(20),
        router("workers", pod, state="ready"): gauge(3),
        router("workers", pod, state="unmatched"): gauge(0),
    }
    for state in ("serving", "unreachable", "ejected", "half_open"):
        series[router("worker_states", pod, state=state)] = gauge(3 if state == "serving" else 0)
    for worker in ("w0", "w1", "w2"):
        series[router("view_age_seconds", pod, worker=worker)] = gauge(0.5)
        series[router("in_flight", pod, worker=worker)] = gauge(3)
        series[router("worker_waiting", pod, worker=worker)] = gauge(0)
    return series


def condition(kind: str, status: str, reason: str) -> str:
    return controller("condition", namespace="shop", kvcluster="rag", condition=kind, status=status, reason=reason)


CONTROLLER: Series = {
    named("up", component="controller", namespace="system", pod="c0"): gauge(1),
    condition("Ready", "True", "Serving"): gauge(1),
    condition("Degraded", "False", "AllWell"): gauge(1),
    controller("watch_age_seconds", resource="pods"): gauge(40),
    controller("reconciles_total", outcome="done"): counter(6),
    controller("reconciles_total", outcome="retry"): counter(0.1),
}
AGENT: Series = {
    named("kvcluster_agent_following", namespace="shop", kvcluster="rag", pod=pod): gauge(1) for pod in ("w0", "w1")
}
HEALTHY: Series = {**of_router("r0"), **of_router("r1"), **CONTROLLER, **AGENT}

FIRES: Mapping[str, Series] = {
    "KVClusterHitRateCollapsed": {
        router("actual_cached_tokens_total", pod): counter(36_000, 6_000) for pod in ("r0", "r1")
    },
    "KVClusterViewStale": {router("view_age_seconds", "r1", worker="w2"): f"0.5x{TROUBLE} 0+60x{REST}"},
    "KVClusterWorkerUnmatched": {router("workers", "r0", state="unmatched"): gauge(0, 1)},
    "KVClusterCachedTokensMispredicted": {
        router("mispredicted_cached_tokens_total", pod, direction="over"): counter(1_200, 30_000)
        for pod in ("r0", "r1")
    },
    "KVClusterTTFTMispredicted": {
        router("ttft_actual_to_predicted_ratio_bucket", pod, le=le): counter(60 if le == "2" else 30, 0)
        for pod in ("r0", "r1")
        for le in ("1", "2")
    },
    "KVClusterTokenizerMissing": {router("tokenizer_loaded", "r1"): gauge(1, 0)},
    "KVClusterCredentialsUnusable": {router("api_keys_unusable", "r1"): gauge(0, 1)},
    "KVClusterCertificateExpiring": {
        # promtool's clock starts at 0; the other router's certificate is good for a month more.
        router("tls_certificate_expires_timestamp_seconds", pod, port="data"): gauge(60 * TROUBLE + days * 86_400)
        for pod, days in (("r0", 37), ("r1", 7))
    },
    "KVClusterAgentNotFollowing": {next(iter(AGENT)): gauge(1, 0)},
    "KVClusterWorkerUnreachable": {router("worker_states", "r0", state="unreachable"): gauge(0, 1)},
    "KVClusterWorkerEjected": {
        # It is tried every few minutes, and ejected again.
        router("worker_states", "r0", state="ejected"): f"0x{TROUBLE}" + " 1 1 0 0" * 22,
        router("worker_states", "r0", state="half_open"): f"0x{TROUBLE}" + " 0 0 1 0" * 22,
    },
    "KVClusterLoadSkewed": {router("in_flight", pod, worker="w0"): gauge(3, 20) for pod in ("r0", "r1")},
    "KVClusterSaturated": {
        router("worker_waiting", pod, worker=worker): gauge(0, 2)
        for pod in ("r0", "r1")
        for worker in ("w0", "w1", "w2")
    },
    "KVClusterRequestsFailing": {router("requests_total", "r0", code="503"): counter(0, 15)},
    "KVClusterRetriesExhausted": {router("retries_denied_total", "r0", why="budget"): counter(0, 3)},
    "KVClusterRouterDown": {named("up", component="router", namespace="shop", kvcluster="rag", pod="r1"): gauge(1, 0)},
    "KVClusterDiscoveryStale": {router("discovery_age_seconds", "r1"): f"20x{TROUBLE} 0+60x{REST}"},
    "KVClusterNotReady": {
        condition("Ready", "True", "Serving"): until_the_trouble(gauge(1)),
        condition("Ready", "False", "NoneReady"): f"_x{TROUBLE} 1x{REST}",
    },
    "KVClusterDegraded": {condition("Degraded", "True", "CrashLoop"): f"_x{TROUBLE} 1x{REST}"},
    "KVClusterControllerDown": {named("up", component="controller", namespace="system", pod="c0"): gauge(1, 0)},
    "KVClusterControllerWatchDead": {controller("watch_age_seconds", resource="pods"): f"40x{TROUBLE} 0+60x{REST}"},
    "KVClusterReconcileFailing": {controller("reconciles_total", outcome="retry"): counter(0.1, 1)},
}
"""For each alert what makes it fire."""

TRAFFIC = {
    name: values
    for name, values in HEALTHY.items()
    if re.match(r"kvcluster_router_(requests|reported|actual|mispredicted|ttft)", name)
}
IDLE = {name: gauge(3, 0) for name in HEALTHY if name.startswith("kvcluster_router_in_flight")}

CALM: Mapping[str, Series] = {
    "healthy": {},
    "no traffic": {**dict.fromkeys(TRAFFIC, counter(0)), **dict.fromkeys(IDLE, gauge(0))},
    "traffic ends": {
        **{name: counter(float(values[2:].partition("x")[0]), 0) for name, values in TRAFFIC.items()},
        **IDLE,
    },
    "routers restart": {
        **{name: until_the_trouble(values) for pod in ("r0", "r1") for name, values in of_router(pod).items()},
        **{
            name: f"_x{TROUBLE + 1} {values.partition('x')[0]}x{REST - 1}"
            for pod in ("r2", "r3")
            for name, values in of_router(pod).items()
        },
    },
    "more prompts that nobody asked before": {router("reported_prompt_tokens_total", "r0"): counter(60_000, 66_000)},
    "a worker is restarted": {
        router("worker_states", "r0", state="unreachable"): f"0x{TROUBLE} 1x2 0x{REST - 3}",
        router("view_age_seconds", "r0", worker="w1"): f"0.5x{TROUBLE} 60x1 0.5x{REST - 2}",
    },
    "scaled to zero": {
        condition("Ready", "True", "Serving"): until_the_trouble(gauge(1)),
        condition("Ready", "False", "ScaledToZero"): f"_x{TROUBLE} 1x{REST}",
    },
    "two workers, evenly busy": {
        **{name: until_the_trouble(values) for name, values in HEALTHY.items() if 'worker="w2"' in name},
        **{router("in_flight", pod, worker=worker): gauge(20) for pod in ("r0", "r1") for worker in ("w0", "w1")},
    },
    "one request fails": {router("requests_total", "r0", code="503"): f"0x{TROUBLE} 1x{REST}"},
}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    executable = shutil.which("promtool")
    if executable is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return subprocess.run([executable, *arguments], capture_output=True, text=True, check=False)


def firing(series: Series, folder: Path, *, step: str = "10m") -> set[str]:
    """Names of the alerts that fire at any time after the trouble, by Prometheus' own reckoning in such steps."""
    ask = f'max_over_time(count by (alertname) (ALERTS{{alertstate="firing"}})[{REST}m:1m])'
    test = {
        "rule_files": [str(FILE)],
        "evaluation_interval": step,
        "group_eval_order": [group["name"] for group in rule_groups()],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{"expr": f"sum by (alertname) ({ask})", "eval_time": f"{MINUTES}m"}],
            }
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(test, width=10_000))
    ran = promtool("test", "rules", str(file))
    output = ran.stdout + ran.stderr
    assert ran.returncode == 0 or "exp:" in output, output
    return set(re.findall(r'alertname="(\w+)"', output))


runs_promtool = pytest.mark.process


@runs_promtool
@pytest.mark.parametrize("alert", ALERTS)
def test_it_fires_when_it_happens_and_no_other_does(alert: str, tmp_path: Path):
    assert firing(HEALTHY | FIRES[alert], tmp_path) == {alert}


@runs_promtool
@pytest.mark.parametrize("situation", CALM)
def test_none_fires_while_nothing_is_wrong(situation: str, tmp_path: Path):
    step = "1m" if "restart" in situation else "10m"
    assert firing(HEALTHY | CALM[situation], tmp_path, step=step) == set()


@runs_promtool
def test_metrics_that_do_not_exist_fire_nothing_but_the_alert_about_absence(tmp_path: Path):
    assert firing({"something_else": gauge(1)}, tmp_path) == {"KVClusterControllerDown"}
    for gone in ("router", "controller"):
        left = {name: values for name, values in HEALTHY.items() if not name.startswith(f"kvcluster_{gone}_")}
        assert firing(left, tmp_path) == set(), gone


# --- the rules as documents ---


def test_every_alert_says_how_bad_it_is_what_happened_and_where_to_read_on():
    rules = [rule for group in rule_groups() for rule in group["rules"]]
    assert {rule["alert"] for rule in rules if "alert" in rule} == set(ALERTS)
    for rule in rules:
        if "alert" not in rule:
            assert re.fullmatch(r"kvcluster(_worker)?:\w+:\w+", rule["record"])
            continue
        name, annotations = rule["alert"], rule["annotations"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+m", rule["for"])
        assert annotations.keys() == {"summary", "description", "runbook_url"}, name
        assert annotations["runbook_url"] == RUNBOOKS + name
        for text in (annotations["summary"], annotations["description"]):
            assert text.endswith("."), name
        labels = set(re.findall(r"\$labels\.(\w+)", " ".join(annotations.values())))
        kept = {label.strip() for by in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in by.split(",")}
        kept |= {"namespace", "kvcluster"} if "kvcluster:" in rule["expr"] else set()
        assert labels <= kept, f"{name}: a label that the expression does not have"


def test_every_metric_and_recording_exists():
    documented = set(re.findall(r"^\| `([\w:]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    rules = [rule for group in rule_groups() for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        asked = {re.sub(r"_(bucket|count)$", "", name) for name in re.findall(r"\bkvcluster_\w+\b(?!:)", rule["expr"])}
        assert asked <= documented, rule
        assert set(re.findall(r"\bkvcluster\w*:\w+:\w+", rule["expr"])) <= recorded, rule


def test_each_alert_has_a_runbook_and_each_runbook_an_alert():
    pages = {page.stem: page.read_text(encoding="utf-8") for page in RUNBOOK_FOLDER.glob("*.md")}
    index = pages.pop("README")
    assert pages.keys() == set(ALERTS)
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n")
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["What it means", "Impact", "How to look", "What to do", "How to test it"], name
        assert "```" in text, f"{name}: commands and queries to look"
        assert f"({name}.md)" in index


def test_panels_lead_to_runbooks_that_exist():
    linked = {alert for board in DASHBOARDS.values() for panel in board.panels for alert in panel.alerts}
    assert linked == set(ALERTS), "and every alert has a panel that shows its figures"


def test_the_documents_table_is_the_rules():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_alerts(text) == text, "run: python -m deploy.monitoring.alerts"


@runs_promtool
def test_the_rules_are_valid():
    checked = promtool("check", "rules", "--lint-fatal", str(FILE))
    assert checked.returncode == 0, checked.stdout + checked.stderr
