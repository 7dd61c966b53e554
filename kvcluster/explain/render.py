"""The page as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from controller.objects.names import Component
from kvcluster.explain.page import (
    ConditionRow,
    EventRow,
    Page,
    PodRow,
    decision_reasons,
    last_decisions,
)
from kvcluster.explain.workers import ForeignWorkerRow, WorkerFigures

DECISIONS_SHOWN = 5
"""Of each router."""
PROSE_WIDTH = 40
"""Columns that a column of prose gets at least."""

_FIGURES = ("blocks", "in flight", "reuse score", "view age")
"""Headings of what routers report about a worker."""

_GOOD, _BAD, _DIM = "green", "bold red", "dim"


def rendered(page: Page) -> RenderableType:
    """The whole page. Text from the cluster is never taken as markup: it may contain brackets."""
    parts: list[RenderableType] = [_head(page)]
    if page.problems:
        parts += [_title("Problems"), *(_bullet(text, _BAD) for text in page.problems)]
    if page.unread:
        parts += [_title("Not known"), *(_bullet(text, "yellow") for text in page.unread)]
    parts += [_title("Conditions"), _conditions(page.conditions)]
    parts += [_title("Pods"), _pods(page.pods) if page.pods else Text("  none")]
    if page.foreign:
        parts += [_title("Workers that are no pods of this KVCluster"), _foreign(page.foreign)]
    parts += [_title("Routing"), *_routing(page)]
    parts += [_title("Events"), _events(page.events) if page.events else Text("  none")]
    return Group(*parts)


def width(page: Page, console: Console) -> int:
    """How many columns the page takes without cutting a name. A narrower terminal breaks the lines itself."""
    wide = console.options.update(width=10_000)
    figures = (_pods(page.pods), _foreign(page.foreign), _decisions(page))
    prose = (_conditions(page.conditions), _events(page.events))
    return max(
        console.width,
        *(Measurement.get(console, wide, table).maximum for table in figures),
        *(Measurement.get(console, wide, table).minimum + PROSE_WIDTH for table in prose),
    )


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `5 min`, `3 h`, `2 d`."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _bullet(text: str, style: str) -> Padding:
    return Padding(Text.assemble(("• ", style), text), (0, 0, 0, 2), expand=False)


def _table(*headings: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=_DIM)
    numbers = set(right)
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in numbers else "left",
            overflow="fold",
            # Only prose is folded: a name that is broken in two cannot be copied.
            no_wrap=heading not in ("message", "state"),
        )
    return table


def _indented(table: Table) -> Padding:
    return Padding(table, (0, 0, 0, 2), expand=False)


def _head(page: Page) -> RenderableType:
    facts = {
        "endpoint": page.endpoint,
        "strategy": page.strategy,
        "hit rate": page.hit_rate or "no requests yet",
        "view age": duration(page.view_age_seconds),
        "API server": page.server,
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(Text(f"  {name}", style=_DIM), Text(value or "-"))
    return Group(Text.assemble((page.name, "bold"), f" in namespace {page.namespace}"), table)


def _conditions(rows: Iterable[ConditionRow]) -> RenderableType:
    table = _table("condition", "status", "reason", "for", "message", right=("for",))
    for row in rows:
        style = {True: _GOOD, False: _BAD, None: "yellow" if row.status == "Unknown" else ""}[row.good]
        table.add_row(
            Text(row.type), Text(row.status, style=style), Text(row.reason, style=style), duration(row.seconds),
            Text(row.message),
        )  # fmt: skip
    return _indented(table) if table.row_count else Text("  none")


def _pods(rows: Iterable[PodRow]) -> RenderableType:
    table = _table(
        "pod", "state", "restarts", "age", "node", *_FIGURES, "matched", right=("restarts", "age", *_FIGURES)
    )
    for row in rows:
        state = Text(row.state, style=_GOOD if row.ready else "yellow" if row.state == "terminating" else _BAD)
        restarts = Text(str(row.restarts), style="yellow" if row.restarts else "")
        # Of a pod that is not ready the routers know nothing but its address.
        cells = _worker_cells(row.worker if row.ready else None) if row.role == Component.WORKER else ("",) * 5
        table.add_row(Text(row.name), state, restarts, duration(row.age_seconds), Text(row.node or "-"), *cells)
    return _indented(table)


def _foreign(rows: Iterable[ForeignWorkerRow]) -> RenderableType:
    table = _table("worker", "URL", "state", *_FIGURES, "matched", right=_FIGURES)
    for row in rows:
        good = row.figures.routable
        state = Text("ready" if good else "not ready", style=_GOOD if good else _BAD)
        table.add_row(Text(row.name), Text(row.url), state, *_worker_cells(row.figures))
    return _indented(table)


def _worker_cells(worker: WorkerFigures | None) -> tuple[RenderableType, ...]:
    if worker is None:
        return ("-",) * 5
    blocks = "-" if worker.blocks is None else f"{worker.blocks:,}"
    of = "" if not worker.capacity else f" / {worker.capacity:,}"
    matched = Text("yes", style=_GOOD) if worker.matched else Text("no", style=_BAD)
    if worker.history:
        matched = Text("by history")
    return blocks + of, str(worker.in_flight), f"{worker.reuse_score:,.0f}", duration(worker.view_age_seconds), matched


def _routing(page: Page) -> Iterable[RenderableType]:
    for router in page.routers:
        if router.error:
            yield _bullet(f"{router.pod} could not be asked: {router.error}", "yellow")
    reasons = decision_reasons(page)
    if reasons:
        total = sum(reasons.values())
        shares = ", ".join(f"{reason} {count:,} ({count / total:.0%})" for reason, count in reasons.items())
        yield Padding(Text(f"{total:,} decisions: {shares}"), (0, 0, 0, 2), expand=False)
    yield _decisions(page) if last_decisions(page, 1) else Text("  no decision is known")


def _decisions(page: Page) -> RenderableType:
    headings = ("router", "ago", "worker", "reason", "matched blocks", "first token")
    table = _table(*headings, right=("ago", "matched blocks", "first token"))
    for pod, decision in last_decisions(page, DECISIONS_SHOWN):
        of = "" if decision.prompt_blocks is None else f" of {decision.prompt_blocks:,}"
        predicted = decision.predicted_ttft_seconds
        table.add_row(
            Text(pod),
            duration(decision.age_seconds),
            Text(decision.worker_id),
            Text(decision.reason),
            f"{decision.matched_blocks:,}{of}",
            "-" if predicted is None else f"{1000 * predicted:,.1f} ms",
        )
    return _indented(table)


def _events(rows: Iterable[EventRow]) -> RenderableType:
    table = _table("ago", "type", "reason", "object", "message", right=("ago",))
    for row in rows:
        times = f" (×{row.count})" if row.count > 1 else ""
        style = "yellow" if row.type == "Warning" else ""
        table.add_row(
            duration(row.seconds), Text(row.type, style=style), Text(row.reason), Text(row.object),
            Text(f"{row.message}{times}"),
        )  # fmt: skip
    return _indented(table)
