"""`safemax report`: the page of an evaluation, rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safemax_sd.commands.console import one_line_errors, say


def report(report_dir: Annotated[Path, typer.Argument(help="Folder with report.json.")]) -> None:
    """Write the page of a finished evaluation again."""
    from safemax_sd.evaluation.page import render

    with one_line_errors():
        say(f"page: {render(report_dir)}")
