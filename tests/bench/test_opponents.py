"""The comparison with other routers: what a router is charged with, and that failures are counted.

Not covered: other routers than ours, which are not installed here, and whether the measured times are right.
"""

from __future__ import annotations

import json
import sys

import pytest

from bench.opponents import kinds, main, measure, prompts

pytestmark = pytest.mark.process


def test_it_measures_our_own_router(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["opponents", "--requests", "128", "--rounds", "1", "--json"])
    main()
    rows = json.loads(capfd.readouterr().out)
    assert [row["failed"] for row in rows] == [0] * 8
    assert {row["router"] for row in rows} == {"kvcluster", "kvcluster round_robin"}
    assert [(row["kind"], row["requests"]) for row in rows[:4]] == [
        ("small prompt", 128),
        ("4 KB prompt", 128),
        ("event, unpaced", 16),
        ("event, paced", 2),
    ]


def test_prompts_share_their_first_half_in_groups() -> None:
    first, second, ninth = (prompt.partition(b'"content": "')[2] for prompt in (prompts(9)[i] for i in (0, 1, 8)))
    assert first[:2000] == ninth[:2000]
    assert first[:2000] != second[:2000]
    assert first != ninth


def test_a_router_that_never_answers_is_an_error() -> None:
    with pytest.raises(TimeoutError, match="answered no request"):
        measure("deaf", f"{sys.executable} -c pass {{port}} {{commas}}", [], kinds(1), ready_seconds=0.5)
