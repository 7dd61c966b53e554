"""What all commands share: exit codes, error messages, and the console for tables."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

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


def drop_output() -> None:
    """Nobody reads standard output any more (`| head`): Python would complain when it flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain(text: str) -> str:
    """Text of others as one line that a terminal only shows: what is no printable character is escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def complain(error: object) -> None:
    """Prints `error: ...` on standard error. What others wrote into it is only shown, as by `plain`."""
    lines = "\n".join(map(plain, str(error).split("\n")))
    Console(stderr=True).print(f"error: {lines}", markup=False, highlight=False, soft_wrap=True)


_P = ParamSpec("_P")


def exits(*failures: type[Exception]) -> Callable[[Callable[_P, None]], Callable[_P, int]]:
    """Makes a function a command that returns its exit code and prints what it raises.

    A `ValueError` is about the manifest, an option or a file that it names. `failures` have other causes.
    """

    def command(run: Callable[_P, None]) -> Callable[_P, int]:
        @functools.wraps(run)
        def exit_code(*args: _P.args, **options: _P.kwargs) -> int:
            try:
                run(*args, **options)
            except ValueError as error:
                complain(error)
                return BAD_INPUT
            except failures as error:
                complain(error)
                return FAILED
            except KeyboardInterrupt:
                return INTERRUPTED
            return 0

        return exit_code

    return command
