"""One Markdown table of several comparisons: its figures are those of their summaries, and it finds its place.

Not covered: the summaries themselves (test_comparison.py).
"""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from bench.comparison import SUMMARY_FILE
from bench.figures import FIGURES
from bench.table import TableError, read_summary, replaced, table


def summary(folder: Path, workload: str, ttfts: dict[str, float | None]) -> Path:
    strategies = {}
    for name, ttft in ttfts.items():
        estimates: dict[str, object] = {figure.name: None for figure in FIGURES}
        if ttft is not None:
            estimates["ttft_p50_seconds"] = {"mean": ttft, "low": ttft - 0.002, "high": ttft + 0.002, "n": 3}
        estimates["errors"] = {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 3}
        strategies[name] = {"estimates": estimates}
    fields = {"config": {"workload": workload}, "strategies": strategies, "why": "because | of it"}
    folder.mkdir()
    (folder / SUMMARY_FILE).write_bytes(orjson.dumps(fields))
    return folder


def test_a_row_for_each_workload_and_contender_the_best_bold(tmp_path: Path) -> None:
    folders = [
        summary(tmp_path / "a", "rag", {"slow": 0.2, "fast": 0.1, "broken": None}),
        summary(tmp_path / "b", "ch|at", {"only": 0.3}),
    ]
    made = table([read_summary(folder) for folder in folders]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in made if line.startswith("| ")]
    assert [row[:2] for row in rows[2:]] == [["rag", "fast"], ["rag", "slow"], ["rag", "broken"], ["ch\\|at", "only"]]
    assert [row[3] for row in rows[2:]] == ["**100 ± 2 ms**", "200 ± 2 ms", "-", "300 ± 2 ms"]
    assert made[-1] == "- ch\\|at: because \\| of it"


def test_a_table_takes_the_place_between_its_marks() -> None:
    page = "a\n<!-- table x -->\nold\n<!-- end of table x -->\nb\n"
    assert replaced(page, "x", r"new \1") == "a\n<!-- table x -->\nnew \\1\n<!-- end of table x -->\nb\n"
    with pytest.raises(TableError, match="needs one line <!-- table y -->"):
        replaced(page, "y", "new")


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"{}"], ids=["none", "no JSON", "a list", "no summary"])
def test_what_is_no_summary_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / SUMMARY_FILE).write_bytes(content)
    with pytest.raises(TableError, match="is not the summary of a comparison"):
        read_summary(tmp_path)
