from __future__ import annotations

from pathlib import Path

import pytest

from controller.generated import MarkersMissingError
from controller.reconcile.costs import INTERVAL
from controller.reconcile.reconciler import POLL, POLL_UNSETTLED
from controller.reconcile.reports import TIMEOUT
from controller.status.cache import AGES
from controller.status.deletion_cost import MARGIN
from controller.status.docs import with_tables
from controller.status.freshness import FRESH_SECONDS
from controller.status.pods import RECOVERED_AFTER
from controller.status.schema import status_schema

DOCUMENT = Path(__file__).parents[3] / "docs" / "status.md"


def test_the_tables_are_those_of_the_enums():
    text = DOCUMENT.read_text()
    assert with_tables(text) == text, "run: python -m controller.status.docs"


def test_every_field_is_documented():
    schema, text = status_schema(), DOCUMENT.read_text()
    cache = [f"cache.{name}" for name in schema["properties"].pop("cache")["properties"]]
    assert all(f"`{name}`" in text for name in (*schema["properties"], *cache))


def test_a_document_without_a_place_for_them_is_refused():
    with pytest.raises(MarkersMissingError, match="conditions: generated"):
        with_tables("# Status\n")


def test_how_often_routers_are_asked_is_documented():
    text = DOCUMENT.read_text()
    for sentence in (
        f"Every {POLL:g} s, and every {POLL_UNSETTLED:g} s while",
        f"an answer has {TIMEOUT:g} s",
        f"at most every {INTERVAL:g} s",
        f"score is higher by {MARGIN - 1:.0%}",
        f"ready for {RECOVERED_AFTER.seconds} s",
        f"ready for {FRESH_SECONDS} s",
        ", ".join(map(str, AGES[:-1])),
    ):
        assert sentence in text, sentence
