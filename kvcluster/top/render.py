"""The live document as text for a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.numbers import count, percent, ratio
from kvcluster.terminal import plain
from kvcluster.top.following import Link, ReaderState
from kvcluster.top.words import BAD, DIM, GOOD, WARN, rate, seconds, sparkline
from kvcluster.top.workers import COLUMNS, NAMES, Column, Order
from router.live.document import DecisionLive, History, Live, QueueLive, RouterLive, RouterPhase, WorkerLive

NARROW = 80
"""Columns below which the history is one column of figures."""
ROUTERS_SHOWN = 4
"""In the head; all of them are in a view of their own."""
PADDING = 2
NAME = 32
"""Columns that a worker's name may take at least; a longer one takes no more than half of the terminal."""
PROBLEM = 16
"""Columns that the words of a problem get at least."""
_ROUTERS = {RouterPhase.SERVING: GOOD, RouterPhase.UNREACHABLE: BAD}


def status_line(title: str, link: Link, now: float, *, paused_since: float | None = None) -> Text:
    """What is looked at, and how old what is shown is."""
    line = Text.assemble((plain(title), "bold"), "  ")
    age = f"{seconds(max(0.0, now - link.received))} old" if link.document is not None else "nothing to show yet"
    if paused_since is not None:
        line.append(f"paused, {seconds(now - paused_since)} old", style=WARN)
    match link.state:
        case ReaderState.FOLLOWING if paused_since is None:
            line.append(f"live, {age}", style=GOOD if now - link.received < 3 else WARN)
        case ReaderState.CONNECTING:
            line.append(f"{'connecting again' if link.problem else 'connecting'}, {age}", style=WARN)
        case ReaderState.WAITING:
            left = max(0.0, (link.retry_at or now) - now)
            line.append(f"disconnected, {age}; next attempt in {left:.0f} s: {plain(link.problem)}", style=BAD)
    return line


def head(document: Live, width: int) -> RenderableType:
    """Totals, routers and history."""
    totals = document.totals
    facts = [
        ("requests", count(totals.requests)),
        ("errors", count(totals.errors)),
        ("hit rate", percent(totals.hit_rate)),
        ("prefill saved", seconds(totals.prefill_seconds_saved)),
        ("GPUs saved", rate(totals.gpus_saved)),
        ("since", seconds(totals.since_seconds)),
    ]
    line = Text()
    for name, value in facts:
        style = BAD if name == "errors" and totals.errors else "bold"
        line.append_text(Text.assemble((f"{name} ", DIM), (value, style), "   "))
    parts: list[RenderableType] = [line]
    shown = document.routers if len(document.routers) <= ROUTERS_SHOWN else _unwell(document.routers)
    parts += [router_line(router) for router in shown[:ROUTERS_SHOWN]]
    if len(shown) < len(document.routers):
        well = len(document.routers) - len(_unwell(document.routers))
        parts.append(Text(f"{well} of {len(document.routers)} routers serve and are ready", style=DIM))
    if document.queues:
        parts.append(queues_line(document.queues))
    return Group(*parts, history(document.history, width))


def queues_line(queues: Sequence[QueueLive]) -> Text:
    """What waits in the routers, class by class, the most urgent first."""
    waiting = sum(queue.waiting for queue in queues)
    line = Text.assemble(("waiting in the routers ", DIM))
    if not waiting:
        line.append("nothing", style=GOOD)
    for queue in queues:
        if not (queue.waiting or queue.shed):
            continue
        line.append("   ")
        line.append(f"{plain(queue.name)} ", style=DIM)
        line.append(count(queue.waiting), style=WARN if queue.waiting else "")
        if queue.oldest_seconds is not None:
            line.append(f" for up to {seconds(queue.oldest_seconds)}")
        if queue.held:
            line.append(f", {count(queue.held)} until a worker is ready")
        if queue.shed:
            line.append(f", {count(queue.shed)} turned away", style=BAD)
    return line


def _unwell(routers: Iterable[RouterLive]) -> tuple[RouterLive, ...]:
    return tuple(router for router in routers if router.state is not RouterPhase.SERVING or not router.ready)


def router_line(router: RouterLive) -> Text:
    """One router and what is wrong with it."""
    line = Text.assemble(("router ", DIM), (plain(router.name), ""), "  ")
    line.append(router.state, style=_ROUTERS.get(router.state, WARN))
    if router.state is not RouterPhase.UNREACHABLE:
        line.append(f", {'ready' if router.ready else 'not ready'}", style=GOOD if router.ready else BAD)
        line.append(f", {plain(router.strategy)}, up {seconds(router.uptime_seconds)}")
        if router.tokenizer and router.tokenizer != "loaded":
            line.append(f", tokenizer {plain(router.tokenizer)}", style=WARN)
        if router.discovery is not None and router.discovery.error:
            age = seconds(router.discovery.age_seconds)
            line.append(f", list of workers {age} old: {plain(router.discovery.error)}", style=BAD)
    if router.reason:
        line.append(f": {plain(router.reason)}", style=WARN)
    return line


_Series = tuple[str, Callable[[History], Sequence[float | None]], Callable[[float | None], str], float | None]

_SERIES: Sequence[_Series] = (
    ("requests/s", lambda h: h.requests_per_second, rate, None),
    ("hit rate", lambda h: h.hit_rate, percent, 1.0),
    ("TTFT p50", lambda h: h.ttft_p50, seconds, None),
    ("TTFT p95", lambda h: h.ttft_p95, seconds, None),
    ("TPOT p50", lambda h: h.tpot_p50, seconds, None),
    ("TPOT p95", lambda h: h.tpot_p95, seconds, None),
    ("load skew", lambda h: h.load_skew, ratio, 2.0),
    ("saved/step", lambda h: h.prefill_seconds_saved, seconds, None),
)


def history(of: History, width: int) -> Table:
    """The last minutes: the latest value of each figure, and a line of all of them."""
    halves = 1 if width < NARROW else 2
    line = max(0, width // halves - 24)
    table = Table.grid(padding=(0, 1), expand=False)
    for _ in range(halves):
        table.add_column(style=DIM, no_wrap=True)
        table.add_column(justify="right", no_wrap=True, min_width=8)
        table.add_column(style="cyan", no_wrap=True)
    cells: list[Text] = []
    for name, values, show, top in _SERIES:
        latest = next((value for value in reversed(values(of)) if value is not None), None)
        cells += [Text(name), Text(show(latest)), Text(sparkline(values(of), line, top))]
    for at in range(0, len(cells), 3 * halves):
        table.add_row(*cells[at : at + 3 * halves])
    return table


# --- workers ---


@dataclass(frozen=True, slots=True)
class Widths:
    """How wide the columns have to be: they only grow, so that they do not jump while rows scroll."""

    seen: dict[int, int] = field(default_factory=dict)

    def fitting(self, rows: Sequence[WorkerLive], width: int) -> list[tuple[int, Column, int]]:
        """(place, column, width) of the columns that fit, in their order; the first one always does."""
        for place, column in enumerate(COLUMNS):
            widest = max((column.text(row).cell_len for row in rows), default=0)
            self.seen[place] = max(self.seen.get(place, len(column.name) + 1), widest)
        chosen: dict[int, int] = {}
        left = width
        for place, column in sorted(enumerate(COLUMNS), key=lambda each: each[1].need):
            need = self.seen[place]
            if column.name == "problem":  # it is cut
                need = min(need, PROBLEM)
            if not chosen:
                need = min(need, max(1, left), max(NAME, left // 2))
            elif need > left:
                continue
            chosen[place] = need
            left -= need + PADDING
        if (place := NAMES.index("problem")) in chosen:
            chosen[place] = max(1, min(self.seen[place], chosen[place] + left + PADDING))
        return [(place, COLUMNS[place], chosen[place]) for place in sorted(chosen)]


def workers(
    rows: Sequence[WorkerLive],
    order: Order,
    width: int,
    *,
    widths: Widths | None = None,
    selected: str | None = None,
) -> Table:
    """These rows as a table that is no wider than `width`; the row with the URL `selected` is marked."""
    table = Table(box=None, pad_edge=False, padding=(0, PADDING, 0, 0), header_style=DIM, expand=False)
    columns = (widths or Widths()).fitting(rows, width)
    for place, column, size in columns:
        mark = ("▼" if order.descending else "▲") if place == order.column else ""
        heading = Text(f"{column.name}{mark}", style="bold" if mark else "")
        table.add_column(
            heading, justify="right" if column.right else "left", width=size, no_wrap=True, overflow="ellipsis"
        )
    for row in rows:
        cells = [column.text(row) for _, column, _ in columns]
        if row.url == selected:
            table.add_row(*(Text(cell.plain) for cell in cells), style="reverse")
        else:
            table.add_row(*cells)
    return table


def details(worker: WorkerLive) -> RenderableType:
    """Everything about one worker."""
    rows = {
        "worker": plain(worker.worker_id),
        "pod": plain(worker.pod) or "-",
        "URL": plain(worker.url),
        "state": f"{worker.state}, {'gets requests' if worker.ready else 'gets no requests'}",
        "problem": plain(worker.problem or "none"),
        "engine": f"{count(worker.running)} running, {count(worker.waiting)} waiting",
        "cache": f"{percent(worker.cache_fill)} filled; the view has {worker.blocks:,} of {worker.capacity:,} blocks",
        "view": f"{worker.trust}, confirmed {seconds(worker.view_age_seconds)} ago",
        "hit rate": f"{percent(worker.hit_rate)}; reuse score {worker.reuse_score:,.0f}",
        "requests": f"{worker.requests:,} sent by these routers, {worker.in_flight:,} of them in flight",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style=DIM, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table


# --- decisions and routers ---


def decisions(rows: Sequence[DecisionLive], at: float, width: int) -> RenderableType:
    """The latest decisions, newest first: where, why, and what the cost is made of."""
    if not rows:
        return Text("no decision yet", style=DIM)
    table = Table(box=None, pad_edge=False, padding=(0, PADDING, 0, 0), header_style=DIM)
    split = width >= 110
    headings = ["ago", "worker", "reason", "matched", "first token"]
    headings += ["queue", "prefill", "decode", "charge"] if split else []
    for heading in headings:
        left = heading in ("worker", "reason")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        cells = [
            Text(seconds(max(0.0, at - row.at))),
            Text(plain(row.worker_id)),
            Text(plain(row.reason)),
            Text(f"{row.matched_blocks:,} of {row.prompt_blocks:,}"),
            Text(seconds(row.predicted_ttft_seconds)),
        ]
        if split:
            prefill = row.load_seconds + row.prefill_seconds
            parts = (row.queue_seconds, prefill, row.decode_seconds, row.charge_seconds)
            cells += [Text(seconds(part)) for part in parts]
        table.add_row(*cells)
    return table


def routers(rows: Iterable[RouterLive]) -> RenderableType:
    """All routers, a line for each."""
    return Group(*(router_line(router) for router in rows))


def page(title: str, link: Link, now: float, order: Order, width: int) -> RenderableType:
    """The whole document, once."""
    document = link.document
    if document is None:
        return status_line(title, link, now)
    rows = order.shown(document.workers)
    parts: list[RenderableType] = [Text(plain(title), style="bold"), head(document, width), Text()]
    parts.append(workers(rows, order, width) if rows else Text(nothing(document, order), style=WARN))
    parts += [Text(), decisions(document.decisions[:10], document.at, width)]
    return Group(*parts)


def nothing(document: Live, order: Order) -> str:
    """Why no worker is shown."""
    if not document.workers:
        return "the routers know no worker"
    if order.words:
        return f"none of the {len(document.workers):,} workers contains {order.words!r}"
    return f"none of the {len(document.workers):,} workers has a problem"
