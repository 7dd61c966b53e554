"""The tests keep to the conventions of CONTRIBUTING.md: every module says what it covers and what it does not, and the
id of every parametrized test tells its case.

Not covered: whether what a docstring says is true, and whether a test can fail. Of ids only the tests that this run
has collected are looked at.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_every_module_says_what_it_does_not_cover() -> None:
    silent = []
    for module in sorted(TESTS.rglob("test_*.py")):
        said = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        covered, _, uncovered = " ".join(said.split()).partition("Not covered:")
        if not covered.strip() or not uncovered.strip():
            silent.append(str(module.relative_to(TESTS)))
    assert silent == []


def test_the_id_of_every_case_tells_it(request: pytest.FixtureRequest) -> None:
    """pytest makes `body0` of what has no text, number or name of its own; an `id=` is what is wanted there."""
    numbered = set()
    for item in request.session.items:
        if isinstance(item, pytest.Function) and (call := getattr(item, "callspec", None)) is not None:
            generated = "|".join(rf"{re.escape(name)}\d+" for name in call.params)
            if re.fullmatch(rf"(?:{generated})(?:-(?:{generated}))*", call.id):
                numbered.add(item.nodeid.partition("[")[0])
    assert sorted(numbered) == []
