"""Draws the pictures of docs/images: `python -m deploy.docs.pictures`. They look the same in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "images"

INK, PALE, PAPER, LINE = "#1f2937", "#6b7280", "#ffffff", "#d1d5db"
SHARED, FIRST, SECOND = "#6366f1", "#0d9488", "#d97706"
COLOURS = {"queue": "#64748b", "prefill": "#6366f1", "slowdown": "#0d9488", "charge": "#d97706"}

WORKED: Sequence[tuple[str, str, dict[str, float]]] = (
    ("w0", "80 of 101 blocks, two requests ahead", {"queue": 220.0, "prefill": 57.5, "slowdown": 588.6, "charge": 0.0}),
    ("w1", "20 blocks, one request ahead", {"queue": 7.7, "prefill": 207.5, "slowdown": 252.8, "charge": 150.0}),
    ("w2", "none, idle", {"queue": 0.0, "prefill": 257.5, "slowdown": 0.0, "charge": 200.0}),
)
"""Of the worked example in docs/routing.md, the row of costs where the blocks are popular. Milliseconds."""


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    style = "font-family: system-ui, sans-serif; font-size: 14px"
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" style="{style}">\n'
        f"  <title>{title}</title>\n"
        f'  <rect width="{width}" height="{height}" rx="8" fill="{PAPER}" stroke="{LINE}"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, words: str, *, fill: str = INK, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'


def cost() -> str:
    """The costs of three workers as stacked bars."""
    scale, left, parts = 0.62, 60, []
    parts.append(_text(20, 30, "What one request would cost on each worker, in milliseconds", weight="600"))
    best = min(WORKED, key=lambda row: sum(row[2].values()))
    for number, row in enumerate(WORKED):
        name, holds, costs = row
        y, x = 56 + number * 62, float(left)
        parts.append(_text(20, y + 20, name, weight="600"))
        for part, value in costs.items():
            if value:
                parts.append(_box(x, y, value * scale, 28, COLOURS[part]))
                if value * scale > 34:
                    parts.append(_text(x + value * scale / 2, y + 19, f"{value:.0f}", fill="#ffffff", anchor="middle"))
                x += value * scale
        total = sum(costs.values())
        chosen = row is best
        words = f"{total:.0f}" + (" – chosen" if chosen else "")
        parts.append(_text(x + 8, y + 19, words, weight="600" if chosen else "400"))
        parts.append(_text(left, y + 44, holds, fill=PALE))
    x = float(left)
    for part, colour in COLOURS.items():
        parts += [_box(x, 244, 14, 14, colour), _text(x + 20, 256, part)]
        x += 110
    return _svg(720, 275, parts, "Costs of three workers as stacked bars")


def prefix_blocks() -> str:
    """Two prompts that share three blocks, and their keys."""
    system = ("You are a", "helpful", "assistant.")
    prompts = (
        ("prompt 1", (*system, "What is", "a cache?"), FIRST, ("k1", "k2", "k3", "k4", "k5")),
        ("prompt 2", (*system, "Tell me a", "joke."), SECOND, ("k1", "k2", "k3", "k6", "k7")),
    )
    parts = [_text(20, 30, "Each block is 16 tokens; its key names everything up to its end", weight="600")]
    for number, (name, blocks, own, keys) in enumerate(prompts):
        y = 52 + number * 92
        parts.append(_text(20, y + 26, name, weight="600"))
        for place, (words, key) in enumerate(zip(blocks, keys, strict=True)):
            x = 100 + place * 120
            parts.append(_box(x, y, 114, 40, SHARED if place < 3 else own))
            parts.append(_text(x + 57, y + 25, words, fill="#ffffff", anchor="middle"))
            parts.append(_text(x + 57, y + 60, key, fill=PALE, anchor="middle"))
    parts.append(f'<path d="M 458 46 V 222" stroke="{PALE}" stroke-dasharray="4 4"/>')
    parts.append(_text(450, 244, "shared: can be used again", fill=PALE, anchor="end"))
    parts.append(_text(466, 244, "different from here on", fill=PALE))
    return _svg(720, 262, parts, "Two prompts share three blocks; from the first different token every key differs")


PICTURES = {"cost.svg": cost, "prefix-blocks.svg": prefix_blocks}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
