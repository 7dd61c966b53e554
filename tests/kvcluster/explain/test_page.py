"""The page of `kvcluster explain`: what it says for what was gathered, and its text.

Not covered: gathering (test_explain, test_cluster).
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from kvcluster.explain.gather import Gathered, RouterAnswer
from kvcluster.explain.page import Page, page
from kvcluster.explain.render import duration, rendered, width
from tests.controller.status.support import deployment, waiting
from tests.kvcluster.explain.support import EVENT, NOW, PODS, ROUTERS, WORKERS, a_pod, ago, cluster, report, row

REPORT = report(decisions={"prefix_match": 90, "no_match": 10}, reuse_score={"rag-worker-0": 132.5})
ANSWERS = tuple(RouterAnswer(name, REPORT, tuple(row(worker) for worker in WORKERS)) for name in ROUTERS)


def gathered(**changes: Any) -> Gathered:
    base = Gathered("https://api", "ns", cluster(), tuple(PODS), (EVENT,), ANSWERS)
    return dataclasses.replace(base, **changes)


def seen(**changes: Any) -> Page:
    return page(gathered(**changes), NOW)


def shown(found: Page) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(rendered(found))
    return out.getvalue()


def test_a_healthy_cluster():
    found = seen()
    assert (found.hit_rate, found.view_age_seconds, found.strategy) == ("82.3%", 0.4, "cache_aware")
    assert found.problems == ()
    good = [row.type for row in found.conditions if row.good]
    assert good == ["Ready", "WorkersAvailable", "RouterAvailable", "CacheViewFresh", "Degraded"]
    assert [pod.name for pod in found.pods] == [*ROUTERS, *WORKERS]
    worker = found.pods[2].worker
    assert worker is not None
    assert (worker.blocks, worker.capacity, worker.in_flight, worker.reuse_score) == (900, 924, 4, 265.0)
    assert found.wanted == {"worker": 4, "router": 2}


def test_the_data_parallel_ranks_of_a_pod_are_added_up():
    def ranks(worker: str) -> list[dict[str, Any]]:
        return [
            row(f"{worker}/{rank}", url=f"http://10.0.0.99:8100#rank={rank}", blocks=100 + rank) for rank in range(2)
        ]

    rows = tuple(each for worker in WORKERS for each in ranks(worker))
    scores = {f"{WORKERS[0]}/{rank}": 10.0 for rank in range(2)}
    answers = tuple(RouterAnswer(name, report(reuse_score=scores), rows) for name in ROUTERS)
    worker = seen(routers=answers).pods[2].worker
    assert worker is not None
    assert (worker.blocks, worker.capacity, worker.in_flight, worker.reuse_score) == (201, 1848, 8, 40.0)


def test_the_page_in_text():
    text = shown(seen())
    for words in (
        "rag in namespace ns",
        "http://rag-router.ns.svc:8000",
        "82.3%",
        "cache_aware",
        "900 / 924",
        "200 decisions: prefix_match 180 (90%), no_match 20 (10%)",
        "Serving",
        "KVCluster/rag",
        "5 min",
        "node-1",
    ):
        assert words in text
    assert "Problems" not in text
    assert "Not known" not in text


def test_what_comes_from_the_cluster_is_no_markup():
    event = {**EVENT, "message": "[bold]loud[/bold] [/]"}
    assert "[bold]loud[/bold] [/]" in shown(seen(events=(event,)))


def test_a_worker_is_recognised_by_its_address_before_its_id_is_known():
    url = "http://10.0.0.0:8100"
    unnamed = RouterAnswer("rag-router-a", REPORT, (row(url, url=url, matching=False, why_not_matching="no state"),))
    found = seen(routers=(unnamed,))
    assert found.pods[2].worker is not None
    assert found.pods[2].worker.why_not == "no state"
    assert found.pods[3].worker is None


def test_a_worker_that_is_not_matched_is_named_with_the_reason():
    rows = [row(worker) for worker in WORKERS]
    rows[1] = row(WORKERS[1], matching=False, why_not_matching="its block size is 32, ours 16")
    found = seen(routers=(ANSWERS[0], RouterAnswer(ROUTERS[1], REPORT, tuple(rows))))
    assert found.problems == ("Worker rag-worker-1 gets requests by load alone: its block size is 32, ours 16",)


def test_a_worker_that_gets_no_requests_is_named_with_the_reason():
    rows = (row(WORKERS[0], ready=False, why_not_ready="silent for 3.0 s"),)
    found = seen(routers=(RouterAnswer(ROUTERS[0], REPORT, rows),))
    assert found.problems == ("Worker rag-worker-0 is ready, and gets no requests: silent for 3.0 s",)


def test_workers_of_others_are_shown_with_their_figures():
    """Two pods of an engine that somebody else runs, without agents: their ids are their URLs."""
    urls = [f"http://10.1.0.{index}:8000" for index in (1, 2)]
    rows = [
        row(url, url=url, pod=f"llama-{index}", view_age=None, matching=False, history=True, why_not_matching="no feed")
        for index, url in enumerate(urls)
    ]
    rows[1] |= {"ready": False, "why_not_ready": "connection refused"}
    answers = tuple(RouterAnswer(name, REPORT, tuple(rows)) for name in ROUTERS)
    found = seen(pods=tuple(PODS[len(WORKERS) :]), routers=answers)
    assert [(worker.name, worker.url) for worker in found.foreign] == [("llama-0", urls[0]), ("llama-1", urls[1])]
    assert found.foreign[0].figures.in_flight == 4
    assert found.problems == ("Worker llama-1 gets no requests: connection refused",)
    text = shown(found)
    (first,) = [line for line in text.splitlines() if line.split()[:2] == ["llama-0", urls[0]]]
    assert first.split()[2:] == ["ready", "900", "/", "924", "4", "0", "-", "by", "history"]
    (second,) = [line for line in text.splitlines() if line.split()[:2] == ["llama-1", urls[1]]]
    assert second.split()[2:4] == ["not", "ready"]


def test_a_worker_of_ours_whose_pod_is_gone_is_not_somebody_elses():
    assert seen(pods=tuple(PODS[1:])).foreign == ()
    other = RouterAnswer(ROUTERS[0], REPORT, (row("mistral-worker-5d-x", url="http://10.0.9.9:8100"),))
    assert [worker.name for worker in seen(routers=(other,)).foreign] == ["mistral-worker-5d-x"]


def test_a_problem_of_a_pod_is_shown_before_the_status_has_it():
    broken = a_pod("rag-worker-x", ready=False, containerStatuses=waiting("ErrImagePull", "not found"))
    found = seen(pods=(*PODS, broken))
    assert len(found.problems) == 1
    assert found.problems[0].startswith("Pod rag-worker-x cannot pull image registry.example/kvcluster:9: not found.")
    assert found.pods[-1].state == "ErrImagePull"
    assert found.pods[-1].worker is None


def test_a_problem_is_shown_once():
    broken = a_pod("rag-worker-x", ready=False, containerStatuses=waiting("ErrImagePull", "not found"))
    none = {"worker": deployment(readyReplicas=0), "router": deployment("router", 2)}
    found = seen(cluster=cluster(pods=(broken,), deployments=none), pods=(broken,), routers=())
    assert [row.type for row in found.conditions if row.good is False] == ["Ready", "WorkersAvailable", "Degraded"]
    assert len(found.problems) == 1
    assert found.problems[0].endswith("may pull from it. (Degraded is True: ImagePullFailed)")


def test_no_name_is_cut_however_narrow_the_terminal():
    name = f"{'n' * 45}-worker-5d8f9b7c6d-x2x4z"
    about = {"kind": "Pod", "name": name}
    found = seen(pods=(a_pod(name),), events=({**EVENT, "involvedObject": about},))
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.width = width(found, console)
    console.print(rendered(found))
    assert out.getvalue().count(name) == 2


def test_a_router_whose_watch_is_dead_is_a_problem():
    discovery = dataclasses.replace(REPORT.discovery, healthy=False, error="403 Forbidden")
    dead = RouterAnswer("rag-router-a", dataclasses.replace(REPORT, discovery=discovery), ())
    assert "403 Forbidden" in seen(routers=(dead,)).problems[0]


@pytest.mark.parametrize(
    ("status", "words"),
    [(None, "It has no status"), ({"observedGeneration": 6}, "about generation 6 and the spec is at 7")],
    ids=["no status", "an older generation"],
)
def test_a_controller_that_is_behind_is_a_problem(status, words):
    silent = {**cluster(), "status": status}
    found = seen(cluster=silent)
    assert words in found.problems[0]
    assert shown(found)


def test_without_routers_the_figures_come_from_the_status():
    found = seen(routers=())
    assert (found.hit_rate, found.view_age_seconds) == ("82.3%", 1)
    assert "no decision is known" in shown(found)


def test_what_could_not_be_read_is_said():
    answer = RouterAnswer("rag-router-a", None, None, "403: pods/proxy is forbidden")
    text = shown(seen(routers=(answer,), unread=("events could not be read: 403: no",)))
    assert "rag-router-a could not be asked: 403: pods/proxy is forbidden" in text
    assert "events could not be read: 403: no" in text


def test_an_empty_cluster_has_a_page():
    bare = {"metadata": {"name": "rag"}}
    assert "rag in namespace ns" in shown(page(Gathered("https://api", "ns", bare), NOW))


def test_events_newest_first_and_at_most_ten():
    events = tuple({**EVENT, "reason": f"R{minutes}", "lastTimestamp": ago(minutes=minutes)} for minutes in range(20))
    found = seen(events=tuple(reversed(events)))
    assert [row.reason for row in found.events] == [f"R{minutes}" for minutes in range(10)]


def test_of_events_of_one_second_the_last_written_comes_first():
    events = tuple({**EVENT, "reason": f"R{n}", "metadata": {"resourceVersion": str(n)}} for n in (9, 11, 10))
    assert [row.reason for row in seen(events=events).events] == ["R11", "R10", "R9"]


def test_an_event_of_the_new_kind_counts_its_series():
    event = {
        **EVENT,
        "lastTimestamp": None,
        "count": None,
        "series": {"count": 7, "lastObservedTime": "2026-03-01T11:59:00.123456Z"},
    }
    found = seen(events=(event,)).events[0]
    assert (found.count, round(found.seconds or 0)) == (7, 60)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, "-"),
        (0.4, "0.4 s"),
        (59.6, "60 s"),
        (119, "119 s"),
        (600, "10 min"),
        (7_200, "2 h"),
        (200_000, "2 d"),
    ],
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected
