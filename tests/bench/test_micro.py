from __future__ import annotations

import json

import pytest

from bench.micro import index


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
