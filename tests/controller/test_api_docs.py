from __future__ import annotations

from pathlib import Path

import pytest

from controller.api.docs import with_tables
from controller.api.fields import FIELDS
from controller.generated import MarkersMissingError

DOCUMENT = Path(__file__).parents[2] / "docs" / "manifest.md"


def test_the_field_tables_are_those_of_the_model():
    text = DOCUMENT.read_text()
    assert with_tables(text) == text, "run: python -m controller.api.docs"


def test_every_field_is_documented_once():
    assert len({field.path for field in FIELDS}) == len(FIELDS)
    assert all(field.description for field in FIELDS)


def test_a_document_without_a_place_for_them_is_refused():
    with pytest.raises(MarkersMissingError, match="fields: generated"):
        with_tables("# The manifest\n")
