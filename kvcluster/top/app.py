"""The live document on a terminal, with keys to sort, filter, pause and scroll."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from enum import Enum, auto
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer, Input, Static

from kvcluster.top.following import BACKOFF, Link, follow
from kvcluster.top.render import Widths, decisions, details, head, nothing, routers, status_line, workers
from kvcluster.top.sources import Source
from kvcluster.top.words import DIM, WARN
from kvcluster.top.workers import Order, Window
from router.live.document import Live, WorkerLive
from runtime.backoff import Backoff

TICK = 1.0
"""Seconds after which the age is shown anew though nothing came."""
LOW = 24
"""Lines below which the head is left out in favour of the workers."""


class View(Enum):
    """What the body shows."""

    WORKERS = auto()
    DECISIONS = auto()
    ROUTERS = auto()
    WORKER = auto()
    """The selected one."""
    HELP = auto()


HELP = """\
↑ ↓ PgUp PgDn Home End   select a worker          Enter  all about it
< >   sort by the column to the left, right       r      the other way round
/     only workers with these words               !      only workers with a problem
p     pause and go on                             Esc    back; forget words, and show all
w     workers     d  decisions     o  routers     q      end

The words are looked for in id, pod, URL, state, trust and problem.
"""


class TopApp(App[None]):
    """Follows one source until `q`. `link` is what is known now, `shown` what the screen shows, which a pause holds."""

    CSS = """
    #status, #head, #body { width: 100%; text-wrap: nowrap; }
    #status, #head { height: auto; }
    #head, #body { margin-top: 1; }
    #body { height: 1fr; overflow: hidden; }
    #words { display: none; border: none; height: 1; padding: 0; }
    #words.open { display: block; }
    """
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "quit"),
        Binding("p,space", "pause", "pause"),
        Binding("slash", "words", "filter", key_display="/"),
        Binding("exclamation_mark", "problems", "problems", key_display="!"),
        Binding("less_than_sign,comma", "sort(-1)", "sort", key_display="<", show=False),
        Binding("greater_than_sign,full_stop", "sort(1)", "sort", key_display="<>"),
        Binding("r", "reverse", "reverse"),
        Binding("w", "view('WORKERS')", "workers"),
        Binding("d", "view('DECISIONS')", "decisions"),
        Binding("o", "view('ROUTERS')", "routers"),
        Binding("enter", "view('WORKER')", "details"),
        Binding("question_mark,h", "view('HELP')", "help", key_display="?"),
        Binding("escape", "leave", "back", show=False),
        *(
            Binding(key, f"move({step})", show=False)
            for key, step in (("up,k", -1), ("down,j", 1), ("home,g", -(10**9)), ("end,G", 10**9))
        ),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
    ]

    def __init__(self, source: Source, order: Order, backoff: Backoff = BACKOFF) -> None:
        super().__init__(ansi_color=True)  # the terminal's own colours and background
        self.source = source
        self.order = order
        self.link = Link()
        self.view = View.WORKERS
        self.window = Window()
        self.paused_at: float | None = None
        """When what is shown was received, while it is held."""
        self._backoff = backoff
        self._held: Live | None = None
        self._selected = ""
        """URL of the selected worker, which stays selected when rows move."""
        self._widths = Widths()

    def compose(self) -> ComposeResult:
        """The parts of the screen, from top to bottom."""
        yield Static(id="status")
        yield Static(id="head")
        yield Static(id="body")
        yield Input(id="words", placeholder="words in id, pod, URL, state, trust or problem")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to follow."""
        self.run_worker(self._follow(), exit_on_error=True)
        self.set_interval(TICK, self._tick)

    async def _follow(self) -> None:
        async for link in follow(self.source, backoff=self._backoff):
            self.link = link
            self.redraw()

    def _tick(self) -> None:
        self.query_one("#status", Static).update(self._status())

    # --- drawing ---

    @property
    def shown(self) -> Live | None:
        """The document on the screen."""
        return self.link.document if self.paused_at is None else self._held

    def redraw(self) -> None:
        """Draw everything."""
        document, width, low = self.shown, self.size.width, self.size.height < LOW
        self._tick()
        top = self.query_one("#head", Static)
        top.display = document is not None and not low
        if document is not None and not low:
            top.update(head(document, width))
        # The body's height is known only after the head has been laid out.
        self.call_after_refresh(self._draw_body)

    def _draw_body(self) -> None:
        self.query_one("#body", Static).update(self._body(self.size.width))

    def on_resize(self, event: events.Resize) -> None:
        """The terminal has another size."""
        self._widths = Widths()
        self.call_after_refresh(self.redraw)  # the app itself learns of its size after this

    def _status(self) -> Text:
        line = status_line(self.source.title, self.link, asyncio.get_running_loop().time(), paused_since=self.paused_at)
        told = []
        if self.order.words:
            told.append(f"only {self.order.words!r}")
        if self.order.problems:
            told.append("only problems")
        if told:
            line.append(f"  [{', '.join(told)}]", style=WARN)
        return line

    def _body(self, width: int) -> RenderableType:
        document = self.shown
        if self.view is View.HELP:
            return Text(HELP)
        if document is None:
            return Text("")
        height = self.query_one("#body", Static).size.height
        match self.view:
            case View.DECISIONS:
                return decisions(document.decisions[: max(1, height - 1)], document.at, width)
            case View.ROUTERS:
                return routers(document.routers)
            case View.WORKER if (worker := self.selected(self.rows())) is not None:
                return details(worker)
        return self._table(document, width, height)

    def _table(self, document: Live, width: int, height: int) -> RenderableType:
        rows, space = self.rows(), max(1, height - 2)
        if not rows:
            return Text(nothing(document, self.order), style=WARN)
        self.window = self.window.moved(self._place(rows), len(rows), space)
        self._selected = rows[self.window.selected].url
        visible = rows[self.window.first : self.window.first + space]
        table = workers(visible, self.order, width, widths=self._widths, selected=self._selected)
        last = self.window.first + len(visible)
        of = f" of {len(document.workers):,}" if len(rows) < len(document.workers) else ""
        return Group(table, Text(f"{self.window.first + 1:,}-{last:,} of {len(rows):,} workers{of}", style=DIM))

    # --- rows ---

    def rows(self) -> list[WorkerLive]:
        """The workers that are shown, in order."""
        return self.order.shown(self.shown.workers) if self.shown is not None else []

    def selected(self, rows: list[WorkerLive]) -> WorkerLive | None:
        """The selected worker, if it is among these."""
        return rows[self._place(rows)] if rows else None

    def _place(self, rows: list[WorkerLive]) -> int:
        known = next((place for place, row in enumerate(rows) if row.url == self._selected), None)
        return min(self.window.selected, len(rows) - 1) if known is None else known

    def _select(self, step: int) -> None:
        if rows := self.rows():
            place = max(0, min(self._place(rows) + step, len(rows) - 1))
            self._selected = rows[place].url
            self._draw_body()

    # --- keys ---

    def action_move(self, step: int) -> None:
        """Select another worker."""
        self._select(step)

    def action_page(self, pages: int) -> None:
        """Select a worker a page further."""
        self._select(pages * max(1, self.query_one("#body", Static).size.height - 3))

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """The wheel moves as the keys do."""
        self._select(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """The wheel moves as the keys do."""
        self._select(-3)

    def action_sort(self, step: int) -> None:
        """Sort by another column."""
        self._ordered(self.order.sorted_by(step))

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._ordered(replace(self.order, reverse=not self.order.reverse))

    def action_problems(self) -> None:
        """Only workers with a problem, or all."""
        self._ordered(replace(self.order, problems=not self.order.problems))

    def _ordered(self, order: Order) -> None:
        """Show the workers in another order, from the first."""
        self.order, self.view = order, View.WORKERS
        self.window, self._selected = Window(), ""
        self.redraw()

    def action_pause(self) -> None:
        """Hold what is shown, or go on."""
        if self.paused_at is None and self.link.document is not None:
            self.paused_at, self._held = self.link.received, self.link.document
        else:
            self.paused_at = self._held = None
        self.redraw()

    def action_view(self, name: str) -> None:
        """Show something else in the body; the same key again leads back to the workers."""
        self.view = View.WORKERS if self.view is View[name] else View[name]
        self.redraw()

    def action_leave(self) -> None:
        """Leave what is open; from the workers, show all of them."""
        if self.query_one("#words", Input).has_class("open"):
            self._close_words()
        elif self.view is not View.WORKERS:
            self.action_view("WORKERS")
        else:
            self._ordered(replace(self.order, words="", problems=False))

    def action_words(self) -> None:
        """Ask for words."""
        field = self.query_one("#words", Input)
        field.add_class("open")
        field.value = self.order.words
        field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while words are typed."""
        self._ordered(replace(self.order, words=event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """The words are complete."""
        self._close_words()

    def _close_words(self) -> None:
        field = self.query_one("#words", Input)
        field.remove_class("open")
        self.set_focus(None)
        self.redraw()
