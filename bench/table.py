"""One table of several comparisons, as Markdown: a row for each workload and contender.

python -m bench.table results/rag results/chat                          prints it
python -m bench.table results/* --into docs/benchmarks.md --name routers    replaces what stands in the page between
                                <!-- table routers --> and <!-- end of table routers -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from bench.comparison import SUMMARY_FILE, escaped
from bench.estimates import Estimate
from bench.figures import BY_NAME, Figure

SHOWN = tuple(
    BY_NAME[name]
    for name in ("hit_rate", "ttft_p50_seconds", "ttft_p95_seconds", "tpot_p50_seconds", "tpot_p95_seconds",
                 "prefill_skew", "errors")
)  # fmt: skip


class TableError(ValueError):
    """A comparison cannot be read, or a page has no place for the table."""


def _estimate(fields: Mapping[str, Any] | None) -> Estimate | None:
    return None if fields is None else Estimate(**fields)


def _mean(contender: Mapping[str, Any], figure: Figure) -> float | None:
    found = _estimate(contender["estimates"][figure.name])
    return None if found is None else found.mean


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary that a comparison wrote to this folder. Raises `TableError`."""
    file = folder / SUMMARY_FILE
    try:
        summary = orjson.loads(file.read_bytes())
        _ = summary["config"]["workload"], summary["strategies"]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise TableError(f"{file} is not the summary of a comparison: {error}") from None
    return dict(summary)


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The rows of one comparison, the smallest TTFT p50 first; the best of each column is bold."""
    contenders = summary["strategies"]
    p50 = BY_NAME["ttft_p50_seconds"]
    order = sorted(contenders, key=lambda name: (_mean(contenders[name], p50) is None, _mean(contenders[name], p50)))
    best = {}
    for figure in SHOWN:
        means = [mean for each in contenders.values() if (mean := _mean(each, figure)) is not None]
        best[figure.name] = (
            None
            if not means or min(means) == max(means)
            else figure.better * max(figure.better * mean for mean in means)
        )
    made = []
    for name in order:
        cells = []
        for figure in SHOWN:
            shown = figure.estimated(_estimate(contenders[name]["estimates"][figure.name]))
            mean = _mean(contenders[name], figure)
            cells.append(f"**{shown}**" if mean is not None and mean == best[figure.name] else shown)
        made.append([escaped(str(summary["config"]["workload"])), escaped(name), *cells])
    return made


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """All of them, with a sentence about each."""
    headings = ["workload", "router", *(figure.heading for figure in SHOWN)]
    lines = [f"| {' | '.join(headings)} |", f"| --- | --- |{' ---: |' * len(SHOWN)}"]
    lines += [f"| {' | '.join(row)} |" for summary in summaries for row in rows(summary)]
    said = [f"- {escaped(str(summary['config']['workload']))}: {escaped(summary['why'])}" for summary in summaries]
    return "\n".join([*lines, "", *said])


def replaced(page: str, name: str, text: str) -> str:
    """The page with this text between the marks of that name. Raises `TableError`."""
    begin, end = f"<!-- table {name} -->", f"<!-- end of table {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise TableError(f"the page needs one line {begin} and one line {end}")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of comparisons (--out)")
    parser.add_argument("--into", type=Path, help="page to write the table into")
    parser.add_argument("--name", default="routers", help="name in the page's marks")
    options = parser.parse_args()
    try:
        text = table([read_summary(folder) for folder in options.folders])
        if options.into is None:
            sys.stdout.write(text + "\n")
        else:
            page = options.into.read_text(encoding="utf-8")
            options.into.write_text(replaced(page, options.name, text), encoding="utf-8")
    except TableError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
