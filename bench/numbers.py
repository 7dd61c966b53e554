"""Numbers as people read them; a dash where there is no value."""

from __future__ import annotations


def seconds(value: float | None) -> str:
    """A time, in the unit that suits its size."""
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def milliseconds(value: float | None) -> str:
    """A time between two tokens."""
    return "-" if value is None else f"{value * 1e3:.1f} ms"


def ratio(value: float | None) -> str:
    """Largest over mean, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def tokens(value: float | None) -> str:
    """A number of tokens, rounded to about three digits."""
    if value is None:
        return "-"
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.0f} k" if abs(value) < 1e6 else f"{value / 1e6:,.2f} M"


def count(value: float | None) -> str:
    """A number of requests."""
    return "-" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def rate(value: float | None) -> str:
    """Requests a second."""
    return "-" if value is None else f"{value:,.2f}/s"
