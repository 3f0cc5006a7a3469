"""`safemax erase`: closed-form edits, each with its own flags."""

from __future__ import annotations

import typer

from safemax_sd.commands.console import one_line_errors, say


def erase(context: typer.Context) -> None:
    """Erase concepts in closed form, or add and remove concepts later (see `safemax erase --edit NAME --help`)."""
    from safemax_sd.erasing.command_line import parse_edit

    with one_line_errors():
        edit = parse_edit(context.args)
        for line in edit.summary(edit.run()):
            say(line)
