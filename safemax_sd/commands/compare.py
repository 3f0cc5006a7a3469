"""`safemax compare`: methods, tasks and seeds in one table."""

from __future__ import annotations

from typing import Annotated

import typer

from safemax_sd.commands.console import console, one_line_errors, say
from safemax_sd.core.errors import SafemaxError


def compare(
    config: Annotated[str, typer.Option("--config", help="YAML file of methods, tasks and seeds.")],
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder of the results, instead of the one in --config.")
    ] = None,
) -> None:
    """Run every method on every task with every seed, resuming where it was stopped; writes tables and a page."""
    from safemax_sd.evaluation.comparison.grid import compare as compare_methods

    with one_line_errors():
        folder, failed = compare_methods(config, output_dir)
        console.print((folder / "compare.md").read_text(encoding="utf8"), soft_wrap=True)
        say(f"page: {folder / 'index.html'}")
        if failed:
            raise SafemaxError(f"{len(failed)} failed, which the same command tries again: {'; '.join(failed)}")
