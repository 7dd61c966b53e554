from __future__ import annotations

import json

import pytest

from controller.status.report import DiscoveryReport, RecentDecision, ReportError, parse_report

FULL = {
    "strategy": "cache_aware",
    "draining": False,
    "workers": {"known": 4, "ready": 3, "matching": 2},
    "view_age_seconds": 0.4,
    "prompt_tokens": 12345,
    "cached_tokens": 10000,
    "decisions": {"prefix_match": 120},
    "recent": [
        {
            "age_seconds": 1.2,
            "worker_id": "rag-worker-abc",
            "reason": "prefix_match",
            "matched_blocks": 12,
            "prompt_blocks": 14,
            "predicted_ttft_seconds": 0.012,
        }
    ],
    "discovery": {"source": "kubernetes", "healthy": True, "age_seconds": 0.8, "error": ""},
    "reuse_score": {"rag-worker-abc": 132.5, "rag-worker-def": 0},
}


def parse(**changes):
    return parse_report(json.dumps({**FULL, **changes}).encode())


def test_a_full_report():
    report = parse()
    assert (report.workers_known, report.workers_ready, report.workers_matching) == (4, 3, 2)
    assert report.recent == (RecentDecision(1.2, "rag-worker-abc", "prefix_match", 12, 14, 0.012),)
    assert report.discovery == DiscoveryReport("kubernetes", True, 0.8, "")
    assert report.reuse_score == {"rag-worker-abc": 132.5, "rag-worker-def": 0.0}


def test_what_may_be_missing_and_what_is_new():
    bare = {"strategy": "x", "workers": {"known": 1, "ready": 1, "matching": 1, "far": 0}, "new": [1]}
    report = parse_report(json.dumps(bare).encode())
    assert (report.view_age_seconds, report.recent, report.reuse_score, report.draining) == (None, (), {}, False)
    assert report.discovery.healthy


def test_counters_kept_as_floats_and_more_cached_than_asked():
    report = parse(prompt_tokens=10.0, cached_tokens=12)
    assert (report.prompt_tokens, report.cached_tokens) == (10, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": None}, "strategy is missing"),
        ({"strategy": 1}, "strategy must be a string, not 1"),
        ({"workers": None}, "workers is missing"),
        ({"workers": [1]}, "workers must be an object"),
        ({"workers": {"known": -1}}, "workers.known must be a whole number of 0 or more, not -1"),
        ({"workers": {"known": True}}, "workers.known must be a whole number of 0 or more, not true"),
        ({"view_age_seconds": "old"}, 'view_age_seconds must be a number of 0 or more, not "old"'),
        ({"recent": [{"worker_id": "w"}]}, r"recent\[0\].reason is missing"),
        ({"recent": [7]}, r"recent\[0\] must be an object"),
        ({"recent": {}}, "recent must be a list"),
        ({"discovery": {"healthy": "yes"}}, "discovery.healthy must be true or false"),
        ({"reuse_score": {"w": "hot"}}, "reuse_score.w must be a number"),
        ({"prompt_tokens": 1.5}, "prompt_tokens must be a whole number"),
    ],
)
def test_what_is_no_report(changes, message):
    with pytest.raises(ReportError, match=message):
        parse(**changes)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b"\xff"])
def test_what_is_no_object(body):
    with pytest.raises(ReportError):
        parse_report(body)
