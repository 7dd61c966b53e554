"""The micro-benchmarks run and measure every operation that they name.

Not covered: how long anything takes. The figures are for people to read and compare, not for a test to judge. The
picker's (`bench.micro.picker`), which starts a router and an Envoy: tests/envoy covers what it measures.
"""

from __future__ import annotations

import json

import pytest

from bench.micro import agent, engine, index, simulation


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
