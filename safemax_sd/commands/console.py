"""Printing of commands, and errors that the user can mend in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.escaping import printable

console = Console(markup=False, emoji=False, highlight=False)
OWN_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command whose flags, `--help` too, are read from a dataclass and not by typer."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors that the user can mend in one line and exit with code 2."""
    try:
        yield
    except SafemaxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def say(text: str) -> None:
    """Print one line, however long it is; names in it may hold anything."""
    console.print(printable(text), soft_wrap=True)
