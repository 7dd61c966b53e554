"""What all commands share: exit codes, error messages, and the console for tables."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class OutputError(RuntimeError):
    """Standard output takes nothing. The message says why."""


class ReaderLeftError(RuntimeError):
    """Nobody reads standard output any more (`| head`): the command ends, and did what it was asked."""


@contextmanager
def writing() -> Iterator[None]:
    """Around what writes to standard output, which is flushed at the end. Raises `OutputError`, `ReaderLeftError`."""
    if sys.stdout is None:  # its file descriptor was closed when the process began
        raise OutputError("standard output is closed")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise ReaderLeftError from None
    except OSError as error:
        _drop_output()
        raise OutputError(f"standard output cannot be written: {error.strerror}") from None


def _drop_output() -> None:
    """What is still to be flushed goes nowhere: Python would complain when it flushes it at the end."""
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

    expected: tuple[type[Exception], ...] = (OutputError, *failures)

    def command(run: Callable[_P, None]) -> Callable[_P, int]:
        @functools.wraps(run)
        def exit_code(*args: _P.args, **options: _P.kwargs) -> int:
            try:
                run(*args, **options)
            except ReaderLeftError:
                return 0
            except ValueError as error:
                complain(error)
                return BAD_INPUT
            except expected as error:
                complain(error)
                return FAILED
            except KeyboardInterrupt:
                return INTERRUPTED
            return 0

        return exit_code

    return command
