"""Console output of commands, and one-line messages for errors that the user can fix."""

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
"""Typer's settings for a command that parses its own flags, including `--help`."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `SafemaxError` of the block in one line and exit with code 2."""
    try:
        yield
    except SafemaxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def say(text: str) -> None:
    """Print one line without wrapping it; unprintable characters are escaped."""
    console.print(printable(text), soft_wrap=True)
