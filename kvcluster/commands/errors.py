"""How a command ends when it cannot do what it was asked."""

from __future__ import annotations

from rich.console import Console

BAD_INPUT = 2
"""Exit code: the manifest or an option is wrong."""
FAILED = 1
"""Exit code: the input was right, what it asked for failed."""
INTERRUPTED = 130
"""Exit code: Ctrl-C, as shells have it."""


def complain(error: object) -> None:
    """Prints `error: ...` on standard error."""
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
