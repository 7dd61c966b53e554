"""The micro-benchmarks run and measure every operation that they name.

Not covered: how long anything takes. The figures are for people to read and compare, not for a test to judge. The
picker's (`bench.micro.picker`), which starts a router and an Envoy: tests/envoy covers what it measures.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.micro import agent, counted, engine, index, request, simulation


def test_the_benchmark_of_decisions_says_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    index.main(["--json", "--rounds", "20"])
    figures = json.loads(capfdbinary.readouterr().out)
    assert [row["matched_blocks"] for row in figures["decisions"]] == [0, 127, 255, 0, 4095, 8191]
    assert all(row["choose_us"] > 0 for row in figures["decisions"])
    assert set(figures["feed"]) == {"stored_us_per_block", "removed_us_per_block"}

    # The table is of the same figures: measuring takes most of the time.
    monkeypatch.setattr(index, "measure", lambda rounds: figures)
    index.main(["--rounds", "1"])
    assert b"131,072" in capfdbinary.readouterr().out


def test_the_benchmark_of_the_agent_measures_every_operation() -> None:
    figures = agent.measure(500)
    assert set(figures) == {"store_us", "remove_us", "list_us", "bytes", "bytes_with_tokens_instead"}
    assert min(figures["store_us"], figures["remove_us"], figures["list_us"]) > 0


def test_the_benchmark_of_the_engine_measures_every_operation() -> None:
    seconds = engine.block_operations(256, rounds=1)
    assert set(seconds) == {"allocate and evict", "store", "release", "look up and acquire"}
    decoding, prefill = engine.decode(2, tokens=4, rounds=1), engine.prefill(4096, rounds=1)
    assert all(value >= 0 for value in (*seconds.values(), decoding, *prefill))


def test_the_benchmark_of_simulations_counts_what_it_played(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    simulation.main(["--json", "--share", "0.02"])
    long, many = json.loads(capfdbinary.readouterr().out)
    assert (long["workers"], long["requests"], many["workers"], many["requests"]) == (8, 10, 20, 400)
    assert min(long["requests_a_second"], many["requests_a_second"]) > 0


PROFILE = """\
version: 1
pid: 7
cmd: python -m x
events: Ir
fn=(1) begin
ob=(1) /usr/lib/libpython3.11.so.1.0
10 100
+2 20
calls=3 5
* 1000
ob=(2) /usr/lib/libc.so.6
fn=(2) memcpy
cob=(1)
cfn=(1)
calls=1 2
-1 50
* 7
totals: 127
"""


def test_a_profile_has_what_each_library_executed_itself() -> None:
    assert counted.parse(PROFILE) == counted.Profile(127, {"libpython3.11.so.1.0": 120, "libc.so.6": 7})


@pytest.mark.parametrize(
    ("now", "found"),
    [
        pytest.param({"a": 1100, "b": 50}, [], id="within the limit"),
        pytest.param({"a": 1101, "b": 50}, ["a: 1,101 instructions, +10% of the 1,000 committed"], id="beyond it"),
        pytest.param({"a": 10, "b": 1}, [], id="less"),
        pytest.param({"a": 1000}, ["b: committed, but not measured"], id="not measured"),
        pytest.param({"a": 1000, "b": 50, "c": 1}, ["c: measured, but not committed"], id="not committed"),
    ],
)
def test_what_takes_more_instructions_than_are_committed_is_named(now: dict[str, int], found: list[str]) -> None:
    assert request.regressions(now, {"a": 1000, "b": 50}) == found


def test_each_count_is_divided_by_what_it_counts() -> None:
    def counts(instructions: int) -> counted.Profile:
        return counted.Profile(instructions, {"libpython3.11.so": instructions - 1, "unknown.so": 1})

    requests, events = request.COUNTED, request.STREAMS * request.EVENTS
    each = {"small prompt": 5000, "4 KB, half known": 7000, "4 KB, known": 6000}
    taken = {name: counts(requests * figure) for name, figure in each.items()}
    taken |= {"streams": counts(9000), "paced": counts(9000 + events * 40), "unpaced": counts(9000 + events * 6)}
    found = request.figures(taken)
    assert {name: shares["all"] for name, shares in found.items()} == {**each, "event, paced": 40, "event, unpaced": 6}
    assert found["small prompt"]["python"] == 5000


def test_a_build_of_python_without_committed_figures_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    measured = {"build": "another", "instructions": {}, "stages": {}}
    monkeypatch.setattr(request, "measure", lambda: measured)
    assert request.main(["--json", "--check"]) == 2
    assert "no figures are committed for another (only for: " in capfd.readouterr().err


@pytest.mark.process
def test_the_counted_process_serves_every_kind_of_request() -> None:
    served = subprocess.run(
        [sys.executable, "-m", "bench.micro.request", "--serve"], stdout=subprocess.PIPE, check=True, text=True
    )
    names = served.stdout.splitlines()
    assert names[:6] == ["small prompt", "4 KB, half known", "4 KB, known", "streams", "paced", "unpaced"]
    assert "small prompt: ledger" in names
