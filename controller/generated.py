"""Documents that hold a generated part between two marker lines."""

from __future__ import annotations


class MarkersMissingError(ValueError):
    """The document has no place for what is generated."""


def between(document: str, begin: str, end: str, content: str) -> str:
    """The document with this content between its markers. Raises `MarkersMissingError`."""
    before, has_begin, rest = document.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise MarkersMissingError(f"the document needs the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"
