"""The table of workers: its columns, and which rows it shows in which order. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from bench.numbers import count, percent
from kvcluster.terminal import plain
from kvcluster.top.words import BAD, DIM, GOOD, WARN, bar, seconds
from router.core.view import Trust
from router.core.worker_state import WorkerPhase
from router.live.document import WorkerLive

FILL = 8
"""Columns of the bar of a cache's filling."""

_PHASES = {
    WorkerPhase.SERVING: GOOD,
    WorkerPhase.STARTING: WARN,
    WorkerPhase.DRAINING: WARN,
    WorkerPhase.PAUSED: WARN,
    WorkerPhase.HALF_OPEN: WARN,
}
_TRUSTS = {Trust.EXACT: GOOD, Trust.PARTIAL: WARN}


@dataclass(frozen=True, slots=True)
class Column:
    """One column. `value` sorts (None comes last), `text` shows."""

    name: str
    value: Callable[[WorkerLive], float | str | None]
    text: Callable[[WorkerLive], Text]
    need: int
    """The narrower the terminal, the fewer columns: those with the smallest number stay longest."""
    right: bool = True
    descending: bool = True
    """How it is sorted at first: the largest figures first, names from A to Z."""


def _state(worker: WorkerLive) -> Text:
    return Text(worker.state, style=_PHASES.get(worker.state, BAD))


def _fill(worker: WorkerLive) -> Text:
    if worker.cache_fill is None:
        return Text("-", style=DIM)
    return Text.assemble((bar(worker.cache_fill, FILL), "cyan"), f" {worker.cache_fill:>4.0%}")


def _age(worker: WorkerLive) -> Text:
    age = worker.view_age_seconds
    return Text(seconds(age), style="" if age is None or age < 5 else WARN)


def _name(worker: WorkerLive) -> str:
    """Numbers in it sort as numbers: `w-9` before `w-10`."""
    return re.sub(r"\d+", lambda found: found[0].zfill(20), worker.worker_id)


def _plain(show: Callable[[WorkerLive], str]) -> Callable[[WorkerLive], Text]:
    return lambda worker: Text(show(worker))


COLUMNS: Sequence[Column] = (
    Column("worker", _name, _plain(lambda w: plain(w.worker_id)), 0, right=False, descending=False),
    Column("state", lambda w: w.state, _state, 1, right=False, descending=False),
    Column("running", lambda w: w.running, _plain(lambda w: count(w.running)), 2),
    Column("waiting", lambda w: w.waiting, _plain(lambda w: count(w.waiting)), 3),
    Column("cache", lambda w: w.cache_fill, _fill, 5),
    Column("hit rate", lambda w: w.hit_rate, _plain(lambda w: percent(w.hit_rate)), 4),
    Column("reuse", lambda w: w.reuse_score, _plain(lambda w: count(round(w.reuse_score))), 9),
    Column("view age", lambda w: w.view_age_seconds, _age, 7),
    Column("trust", lambda w: w.trust, lambda w: Text(w.trust, style=_TRUSTS.get(w.trust, BAD)), 8, right=False),
    Column("in flight", lambda w: w.in_flight, _plain(lambda w: count(w.in_flight)), 10),
    Column("requests", lambda w: w.requests, _plain(lambda w: count(w.requests)), 11),
    Column(
        "problem", lambda w: w.problem, lambda w: Text(plain(w.problem or ""), style=WARN), 6,
        right=False, descending=False,
    ),
)  # fmt: skip
NAMES = tuple(column.name for column in COLUMNS)


class NoColumnError(ValueError):
    """`--sort` names no column."""


@dataclass(frozen=True, slots=True)
class Order:
    """Which workers are shown, and in which order."""

    column: int = 0
    reverse: bool = False
    """Against the column's own order."""
    words: str = ""
    """Only workers that contain them."""
    problems: bool = False
    """Only workers that have a problem."""

    def sorted_by(self, step: int) -> Order:
        """Sorted by the column that is `step` further on."""
        return replace(self, column=(self.column + step) % len(COLUMNS), reverse=False)

    @property
    def descending(self) -> bool:
        """Whether the largest come first."""
        return COLUMNS[self.column].descending != self.reverse

    def shown(self, workers: Iterable[WorkerLive]) -> list[WorkerLive]:
        """The rows. Workers without a value come last in either direction; equal ones are sorted by URL."""
        rows = sorted((worker for worker in workers if self._matches(worker)), key=lambda worker: worker.url)
        value = COLUMNS[self.column].value
        valued = [row for row in rows if value(row) is not None]
        valued.sort(key=value, reverse=self.descending)  # type: ignore[arg-type]
        return valued + [row for row in rows if value(row) is None]

    def _matches(self, worker: WorkerLive) -> bool:
        if self.problems and worker.problem is None and worker.ready:
            return False
        words = self.words.casefold()
        texts = (worker.worker_id, worker.pod, worker.url, worker.state, worker.trust, worker.problem or "")
        return not words or any(words in text.casefold() for text in texts)


def by_name(name: str) -> Order:
    """The order of `--sort`: a column's name, with `-` before it the other way round. Raises `NoColumnError`."""
    wanted = name.removeprefix("-").replace("_", " ").replace("-", " ").casefold()
    if wanted not in NAMES:
        raise NoColumnError(f"--sort takes one of {', '.join(NAMES)}, not {name!r}")
    return Order(NAMES.index(wanted), reverse=name.startswith("-"))


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the rows that fits, around the selected worker."""

    first: int = 0
    selected: int = 0

    def moved(self, to: int, rows: int, height: int) -> Window:
        """With row `to` selected, or the nearest one that exists, and visible."""
        selected = max(0, min(to, rows - 1))
        first = min(self.first, selected, max(0, rows - height))
        return Window(max(first, selected - height + 1, 0), selected)
