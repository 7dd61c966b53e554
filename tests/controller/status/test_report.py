"""Reading a router's report: what must be there, what may be missing, and how a wrong field is named.

Not covered: that routers send such reports (tests/kube/e2e and tests/e2e read them from real ones).
"""

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


def test_every_field_of_a_full_report_is_read():
    report = parse()
    assert (report.workers_known, report.workers_ready, report.workers_matching) == (4, 3, 2)
    assert report.recent == (RecentDecision(1.2, "rag-worker-abc", "prefix_match", 12, 14, 0.012),)
    assert report.discovery == DiscoveryReport("kubernetes", True, 0.8, "")
    assert report.reuse_score == {"rag-worker-abc": 132.5, "rag-worker-def": 0.0}


def test_optional_fields_may_be_missing_and_unknown_ones_are_ignored():
    bare = {"strategy": "x", "workers": {"known": 1, "ready": 1, "matching": 1, "far": 0}, "new": [1]}
    report = parse_report(json.dumps(bare).encode())
    assert (report.view_age_seconds, report.recent, report.reuse_score, report.draining) == (None, (), {}, False)
    assert report.discovery.healthy


def test_counts_may_be_floats_and_cached_tokens_never_exceed_prompt_tokens():
    report = parse(prompt_tokens=10.0, cached_tokens=12)
    assert (report.prompt_tokens, report.cached_tokens) == (10, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"strategy": None}, "strategy: Input should be a valid string", id="null for a string"),
        pytest.param({"strategy": 1}, "strategy: Input should be a valid string", id="number for a string"),
        pytest.param({"workers": None}, r"workers\.known: Field required", id="no counts of workers"),
        pytest.param({"workers": [1]}, r"workers\.known: Field required", id="list for an object"),
        pytest.param({"workers": {"known": -1}}, r"workers\.known: .*greater than or equal to 0", id="negative count"),
        pytest.param({"workers": {"known": True}}, r"workers\.known: .*valid integer", id="true for a count"),
        pytest.param({"prompt_tokens": 1.5}, "prompt_tokens: .*valid integer", id="fraction for a count"),
        pytest.param({"view_age_seconds": "old"}, "view_age_seconds: .*valid number", id="string for a number"),
        pytest.param({"reuse_score": {"w": "hot"}}, r"reuse_score\.w: .*valid number", id="string for a score"),
        pytest.param({"recent": [{"worker_id": "w"}]}, r"recent\.0\.reason: Field required", id="no reason"),
        pytest.param({"recent": [7]}, r"recent\.0: .*an object", id="number for a decision"),
        pytest.param({"recent": {}}, "recent: .*valid array", id="object for a list"),
        pytest.param({"discovery": {"healthy": "yes"}}, r"discovery\.healthy: .*valid boolean", id="string for true"),
    ],
)
def test_a_report_with_a_wrong_field_is_refused_by_the_name_of_the_field(changes, message):
    with pytest.raises(ReportError, match=message):
        parse(**changes)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b"\xff"], ids=repr)
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(ReportError, match=r"Invalid JSON|an object"):
        parse_report(body)
