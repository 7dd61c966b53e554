from __future__ import annotations

import json

import pytest

from bench.micro.index import main


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_the_benchmark_of_decisions_says_what_it_measured(
    arguments: list[str], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    main([*arguments, "--rounds", "1"])
    printed = capfdbinary.readouterr().out
    if not arguments:
        assert b"131,072" in printed
        return
    figures = json.loads(printed)
    assert [row["matched_blocks"] for row in figures["decisions"]] == [0, 127, 255, 0, 4095, 8191]
    assert all(row["choose_us"] > 0 for row in figures["decisions"])
    assert set(figures["feed"]) == {"stored_us_per_block", "removed_us_per_block"}
