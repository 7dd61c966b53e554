"""Figures as words and signs."""

from __future__ import annotations

from collections.abc import Sequence

GOOD, WARN, BAD, DIM = "green", "yellow", "bold red", "dim"
_LEVELS = "▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉"


def rate(value: float | None) -> str:
    """`12.5`; of what is more than nothing and rounds to it, `<0.1`."""
    if value is None:
        return "-"
    return "<0.1" if 0 < value < 0.05 else f"{value:,.1f}"


def seconds(value: float | None) -> str:
    """`0 s`, `4 ms`, `0.4 s`, `12 s`, `5 min`, `3 h`, `2 d`."""
    if value is None:
        return "-"
    if abs(value) < 0.00005:
        return "0 s"
    if abs(value) < 0.0995:
        return f"{1000 * value:.1f} ms" if abs(value) < 0.00995 else f"{1000 * value:.0f} ms"
    if abs(value) < 9.95:
        return f"{value:.2f} s" if abs(value) < 0.995 else f"{value:.1f} s"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if value < limit:
            return f"{value / size:.0f} {unit}"
    return f"{value / 86_400:.0f} d"


def bar(share: float, width: int) -> str:
    """A bar of so many columns, filled by this share, in eighths of a column."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_PARTS[part] if part else "")).ljust(width)


def sparkline(values: Sequence[float | None], width: int, top: float | None = None) -> str:
    """The last values as one line of at most `width` columns; a space where there is none. The highest bar is the
    largest value, or `top` if that is more."""
    if not values or width <= 0:
        return ""
    drawn = _squeezed(values, width)
    largest = max((value for value in drawn if value is not None), default=0.0)
    largest = max(largest, top or 0.0)
    return "".join(
        " " if value is None else _LEVELS[min(7, int(8 * value / largest))] if largest > 0 else _LEVELS[0]
        for value in drawn
    )


def _squeezed(values: Sequence[float | None], width: int) -> list[float | None]:
    """No more than `width` values: each the mean of its neighbours, so that all of the time is shown."""
    if len(values) <= width:
        return list(values)
    found: list[float | None] = []
    for column in range(width):
        group = values[column * len(values) // width : (column + 1) * len(values) // width]
        known = [value for value in group if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found
