"""The live document: it survives its own encoding, and what is no document is named.

Not covered: what the figures in it are (`test_report`, `test_history`) and how copies of it are kept up to date
(`test_updates`).
"""

from __future__ import annotations

import orjson
import pytest

from router.live.document import DocumentError, decode, encode
from tests.router.live import sample


@pytest.mark.parametrize("workers", [0, 4, 60])
def test_a_document_is_the_same_after_it_was_sent(workers: int) -> None:
    document = sample.live(workers)
    assert decode(encode(document)) == document


def test_a_reader_of_an_older_version_ignores_fields_that_it_does_not_know() -> None:
    document = sample.live()
    fields = orjson.loads(encode(document))
    fields["workers"][0]["temperature"] = 81
    assert decode(orjson.dumps(fields)) == document


def test_the_error_names_the_field_that_is_wrong() -> None:
    fields = orjson.loads(encode(sample.live()))
    fields["workers"][1]["state"] = "happy"
    with pytest.raises(DocumentError, match=r"workers\.1\.state: .*'serving'"):
        decode(orjson.dumps(fields))


def test_what_is_no_json_is_no_document() -> None:
    with pytest.raises(DocumentError, match="Invalid JSON"):
        decode(b"<html>")
