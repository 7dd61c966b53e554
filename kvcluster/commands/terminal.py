"""How commands speak: exit codes, complaints, and the console that tables go to."""

from __future__ import annotations

from rich.console import Console

BAD_INPUT = 2
"""Exit code: the manifest or an option is wrong."""
FAILED = 1
"""Exit code: the input was right, what it asked for failed."""
INTERRUPTED = 130
"""Exit code: Ctrl-C, as shells have it."""

PIPE_WIDTH = 120


def output() -> Console:
    """Standard output. A pipe has no width of its own: at the usual guess of 80 columns tables would be folded."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def complain(error: object) -> None:
    """Prints `error: ...` on standard error."""
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
