"""The diagrams of docs/states.md, and the generator that draws them.

Covers: that the page shows the present code; what the generator draws, refuses and leaves out. Not covered: whether
the machines are right (each has tests of its own), or whether Mermaid can show the page.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto

import pytest

from tests.diagrams import MACHINES, PAGE, DiagramError, Machine, draw, events_of, render


class Door(Enum):
    OPEN = auto()
    SHUT = auto()
    GONE = auto()


class Hand(Enum):
    PUSH = auto()
    PULL_HARD = auto()


STEPS = {(Door.OPEN, Hand.PUSH): Door.SHUT, (Door.SHUT, Hand.PULL_HARD): Door.OPEN, (Door.SHUT, Hand.PUSH): Door.GONE}
DOOR = Machine("door", Door, Door.OPEN, lambda door, hand: STEPS[door, hand], events_of(Hand))


def test_the_page_shows_the_present_code() -> None:
    page = PAGE.read_text("utf-8")
    assert page == render(page, MACHINES), "run: python -m tests.diagrams"


def test_every_step_that_the_function_takes_is_drawn_and_no_other() -> None:
    assert draw(DOOR).splitlines() == [
        "stateDiagram-v2",
        "    [*] --> open",
        "    open --> shut: push",
        "    shut --> gone: push",
        "    shut --> open: pull hard",
        "    gone --> [*]",
    ]


def test_a_step_that_changes_nothing_is_not_drawn() -> None:
    tolerant = replace(DOOR, transition=lambda door, hand: STEPS.get((door, hand), door))
    assert draw(tolerant) == draw(DOOR)


def test_a_state_that_nothing_leads_to_is_an_error() -> None:
    with pytest.raises(DiagramError, match="door: no event leads to gone"):
        draw(replace(DOOR, events=events_of([Hand.PULL_HARD]), start=Door.SHUT))


def test_an_error_of_the_machine_itself_is_not_taken_for_a_refusal() -> None:
    def broken(door: Door, hand: Hand) -> Door:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        draw(replace(DOOR, transition=broken))


def test_a_stale_diagram_is_replaced_and_the_prose_around_it_kept() -> None:
    page = "before\n\n<!-- states: door -->\n```mermaid\nold\n```\n\nafter\n"
    assert render(page, [DOOR]) == f"before\n\n<!-- states: door -->\n```mermaid\n{draw(DOOR)}```\n\nafter\n"
    assert render(render(page, [DOOR]), [DOOR]) == render(page, [DOOR])


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("no marker\n", id="the page lacks a machine"),
        pytest.param("<!-- states: door -->\n<!-- states: window -->\n", id="the page names an unknown machine"),
        pytest.param("<!-- states: door -->\n<!-- states: door -->\n", id="the page names a machine twice"),
    ],
)
def test_page_and_list_name_the_same_machines(page: str) -> None:
    with pytest.raises(DiagramError, match=r"look at: (door|window)"):
        render(page, [DOOR])
