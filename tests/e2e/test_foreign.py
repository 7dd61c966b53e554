"""`kvcluster compare` with a strategy of ours and another router in one run, each before cold workers.

Not covered: real other routers (a stand-in takes their place, tests/bench/standin_router.py), and templates that are
refused (tests/bench/test_foreign.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from bench.record import read_records

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.process


def test_another_router_is_compared_with_ours(tmp_path: Path) -> None:
    manifest, out = tmp_path / "two.yaml", tmp_path / "out"
    manifest.write_text((ROOT / "examples" / "rag.yaml").read_text().replace("replicas: 4", "replicas: 2"))
    standin = f"{sys.executable} -m tests.bench.standin_router --port {{port}} {{workers}}"
    command = [
        *(sys.executable, "-m", "kvcluster", "compare", str(manifest), "--strategies", "round_robin"),
        *("--router", f"in turn={standin}", "--workload", "rag", "--limit", "40", "--speed", "8"),
        *("--slo-ttft", "1m", "--out", str(out), "--raw", str(tmp_path / "raw.jsonl")),
    ]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr

    ours, theirs = (orjson.loads((out / f"results_{name}.json").read_bytes()) for name in ("round_robin", "in-turn"))
    for result in (ours, theirs):
        assert (result["requests"], result["errors"]) == (40, 0)
        assert result["goodput"]["attainment"] == 1.0
    # Both send in turn and begin cold, so the workers do the same work, whoever counts it.
    assert theirs["hit_rate"] == pytest.approx(ours["hit_rate"], abs=0.1)
    assert theirs["hit_rate"] > 0
    assert theirs["config"]["router"] == standin
    records = read_records(tmp_path / "raw_in-turn.jsonl")
    assert {record.worker for record in records} == {""}
    tallies = theirs["workers"]
    assert set(tallies) == {"rag-worker-0", "rag-worker-1"}
    # The workers' own counters, without the requests that showed that the router was ready.
    assert sum(tally["requests"] for tally in tallies.values()) == 40
    prompt, cached = (sum(getattr(record, name) for record in records) for name in ("prompt_tokens", "cached_tokens"))
    assert sum(tally["prompt_tokens"] for tally in tallies.values()) == prompt
    assert sum(tally["uncached_tokens"] for tally in tallies.values()) == prompt - cached
    summary = orjson.loads((out / "strategy_comparison_summary.json").read_bytes())
    assert set(summary["strategies"]) == {"round_robin", "in turn"}
    assert summary["origin"]["routers"] == {"in turn": standin}
