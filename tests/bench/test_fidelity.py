"""Simulated runs beside live ones: differences, their means and ranges, the bounds, the table.

Not covered: the runs themselves, which take minutes (docs/simulator.md has their table).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.fidelity import Figures, differences, figures, main, markdown, read_cases
from bench.record import Record, write_records


def run(ttfts: list[float], cached: int, tpot: float) -> list[Record]:
    return [
        Record(i, i, i, i + ttft, i + ttft + 9 * tpot, "w", prompt_tokens=100, cached_tokens=cached, output_tokens=10)
        for i, ttft in enumerate(ttfts)
    ]


def write(folder: Path, name: str, records: list[Record]) -> Path:
    write_records(folder / name, records)
    return folder / name


def test_figures_are_those_of_the_records() -> None:
    assert figures(run([0.1, 0.2, 0.3], 40, 0.02)) == Figures(
        pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0.29), pytest.approx(0.02)
    )
    with pytest.raises(ValueError, match="no request of this run was answered"):
        figures([Record(0, 0.0, 0.0)])


def test_times_differ_by_shares_and_hit_rates_by_points() -> None:
    live, simulated = Figures(0.5, 0.1, 0.2, 0.02), Figures(0.49, 0.11, 0.18, 0.02)
    found = differences(live, simulated)
    assert list(found.values()) == [pytest.approx(value) for value in (-0.01, 0.1, -0.1, 0.0)]


def test_runs_of_one_case_become_a_row_with_mean_and_range(tmp_path: Path) -> None:
    live = write(tmp_path, "live", run([0.1] * 4, 50, 0.02))
    near = write(tmp_path, "near", run([0.102] * 4, 50, 0.02))
    far = write(tmp_path, "far", run([0.11] * 4, 50, 0.02))
    cases = read_cases([f"rag=/{live}:{near}".replace("=//", "=/"), f"rag={live}:{far}"])
    (case,) = cases
    assert case.differences("ttft_p50") == [pytest.approx(0.02), pytest.approx(0.1)]
    assert not case.within("ttft_p50")
    assert case.within("ttft_p95")
    (row,) = markdown(cases).splitlines()[2:]
    assert row.startswith(
        "| rag | 2 | 50.0 / 50.0 %, +0.0 pt (+0.0 to +0.0) | 100.0 / 106.0 ms, +6.0 % (+2.0 to +10.0) **off** |"
    )


def test_the_command_fails_if_a_mean_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = write(tmp_path, "live", run([0.1] * 4, 50, 0.02))
    far = write(tmp_path, "far", run([0.2] * 4, 50, 0.02))
    for simulated, code in ((live, 0), (far, 1)):
        monkeypatch.setattr("sys.argv", ["fidelity", f"rag={live}:{simulated}"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    with pytest.raises(ValueError, match="write CASE=LIVE:SIMULATED"):
        read_cases(["rag"])
