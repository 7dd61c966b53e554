"""What all commands share: exit codes, error messages, and the console for tables."""

from __future__ import annotations

from rich.console import Console

BAD_INPUT = 2
"""Exit code: the manifest or an option is wrong."""
FAILED = 1
"""Exit code: the input was right, but what it asked for failed."""
INTERRUPTED = 130
"""Exit code: Ctrl-C, as shells have it."""

PIPE_WIDTH = 120


def output() -> Console:
    """Standard output. A pipe has no width, and rich would fold tables at its default of 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def complain(error: object) -> None:
    """Prints `error: ...` on standard error."""
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
