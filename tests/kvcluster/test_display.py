"""How `kvcluster up` shows a cluster: the table, lines and JSON lines, and hit rates read from metrics.

Not covered: a running cluster (test_up).
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from controller.local.desired_processes import Role
from controller.local.process import ProcessState, ProcessStatus
from controller.local.view import ClusterView, WorkerView, hit_rate, worker_view
from kvcluster.display import Endpoints, JsonDisplay, LineDisplay, TableDisplay

ROUTER = ProcessStatus("demo-router", Role.ROUTER, "http://127.0.0.1:8000", ProcessState.READY, 10, 0)
WORKER = ProcessStatus("demo-worker-0", Role.WORKER, "http://127.0.0.1:1", ProcessState.READY, 11, 2)
VIEW = ClusterView(
    "demo", "cache_aware", ROUTER, (WorkerView(WORKER, True, "", 900, 924, running=3, waiting=1, hit_rate=0.625),)
)
ENDPOINTS = Endpoints("http://127.0.0.1:8000", "http://127.0.0.1:9000", Path("/logs"))


def shown(use) -> str:
    out = io.StringIO()
    with TableDisplay(Console(file=out, width=200, force_terminal=True, color_system=None), "demo") as display:
        use(display)
    return out.getvalue()


def test_the_table_has_a_row_a_process():
    def use(display):
        display.change(WORKER)
        display.change(ROUTER)
        display.view(VIEW)

    rows = [line.split() for line in shown(use).splitlines() if "demo-" in line][-2:]
    assert [cell for cell in rows[0] if cell != "│"] == ["demo-router", "10", "ready", "0"]
    assert [cell for cell in rows[1] if cell != "│"] == [
        *("demo-worker-0", "11", "ready", "900", "/", "924", "3", "1", "62.5%", "2"),
    ]


def test_the_table_says_why_a_worker_gets_nothing():
    def use(display):
        display.change(WORKER)
        silent = dataclasses.replace(VIEW.workers[0], routable=False, note="silent for 2.1 s [x]")
        display.view(dataclasses.replace(VIEW, workers=(silent,)))

    assert "not routable silent for 2.1 s [x]" in shown(use)


def test_a_dead_process_is_shown_with_its_exit():
    status = dataclasses.replace(WORKER, state=ProcessState.BACKOFF, pid=None, detail="was killed by SIGKILL")
    assert "backoff was killed by SIGKILL" in shown(lambda display: display.change(status))


def test_lines():
    lines = []
    with LineDisplay(lines.append, clock=lambda: "12:00:00") as display:
        display.change(WORKER)
        display.change(dataclasses.replace(WORKER, state=ProcessState.BACKOFF, pid=None, detail="exited with code 3"))
        display.ready(ENDPOINTS)
        display.view(VIEW)
    assert lines == [
        "12:00:00 demo-worker-0 ready (pid 11)\n",
        "12:00:00 demo-worker-0 backoff: exited with code 3\n",
        "12:00:00 ready: OpenAI API at http://127.0.0.1:8000/v1, live page at http://127.0.0.1:9000/, "
        "management at the same port\n",
    ]


def test_json_lines_report_a_status_only_when_it_changed():
    lines = []
    with JsonDisplay(lines.append) as display:
        display.say("hello")
        display.change(WORKER)
        display.ready(ENDPOINTS)
        display.view(VIEW)
        display.view(VIEW)
    events = [json.loads(line) for line in lines]
    assert [event.pop("event") for event in events] == ["message", "process", "ready", "status"]
    assert all(event.pop("time") for event in events)
    assert events[0] == {"message": "hello"}
    assert (events[1]["state"], events[1]["pid"], events[1]["restarts"]) == ("ready", 11, 2)
    assert events[2] == {
        "url": ENDPOINTS.url,
        "management_url": ENDPOINTS.management_url,
        "log_dir": "/logs",
        "envoy_admin": None,
    }
    assert events[3]["workers"][0]["hit_rate"] == 0.625


METRICS = """
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 200.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
"""


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [(METRICS, 0.25), (METRICS.replace(" 200.0", " 0.0"), None), ("", None)],
    ids=["some hits", "no queries", "no metrics"],
)
def test_hit_rate_from_a_workers_metrics(metrics, expected):
    assert hit_rate(metrics) == expected


def test_the_ranks_of_a_worker_are_added_up():
    rows = [
        {"ready": ready, "why_not_ready": why, "blocks": 5, "capacity": 9, "load": load}
        for ready, why, load in (
            (True, "", {"running": 2, "waiting": 1}),
            (False, "it failed", {"running": 1, "waiting": 0}),
            (True, "", None),
        )
    ]
    assert worker_view(WORKER, rows, None) == WorkerView(
        WORKER, routable=False, note="it failed", blocks=15, capacity=27, running=3, waiting=1
    )


def test_a_worker_the_router_does_not_list_is_shown_by_its_process():
    assert worker_view(WORKER, (), None) == WorkerView(WORKER)


@pytest.mark.parametrize(
    ("why", "note"),
    [
        pytest.param("No adapter found for x", "adapter sql is not loaded: No adapter found for x", id="refused"),
        pytest.param("", "adapter sql is not loaded: it is being loaded", id="being loaded"),
    ],
)
def test_a_worker_without_one_of_its_adapters_is_ready_and_says_so(why: str, note: str):
    row = {"ready": True, "why_not_ready": "", "missing_adapters": {"sql": why}}
    view = worker_view(WORKER, [row], None)
    assert (view.routable, view.note) == (True, note)

    def use(display):
        display.change(WORKER)
        display.view(ClusterView("demo", "cache_aware", ROUTER, (view,)))

    assert f"ready {note}" in shown(use)
