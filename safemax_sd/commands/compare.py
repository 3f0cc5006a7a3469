"""`safemax compare`: methods, tasks and seeds in one table."""

from __future__ import annotations

from typing import Annotated

import typer

from safemax_sd.commands.console import console, one_line_errors, say
from safemax_sd.core.errors import OptionError, SafemaxError


def compare(
    config: Annotated[str, typer.Option("--config", help="YAML file of methods, tasks and seeds.")],
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder of the results, instead of the one in --config.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print tasks, pictures and model calls; nothing is loaded or run.")
    ] = False,
    seconds_per_call: Annotated[
        float | None,
        typer.Option(
            "--seconds_per_call",
            help="Seconds that your card takes to evaluate the network on one sample, for the hours of --dry_run.",
        ),
    ] = None,
) -> None:
    """Run every method on every task with every seed, resuming where it was stopped; writes tables and a page."""
    with one_line_errors():
        if dry_run:
            from safemax_sd.evaluation.comparison.dry_run import dry_run as described

            console.print(described(config, output_dir, seconds_per_call=seconds_per_call), soft_wrap=True)
            return
        if seconds_per_call is not None:
            raise OptionError("--seconds_per_call", seconds_per_call, "has no effect without --dry_run")
        from safemax_sd.evaluation.comparison.grid import compare as compare_methods

        folder, failed = compare_methods(config, output_dir)
        console.print((folder / "compare.md").read_text(encoding="utf8"), soft_wrap=True)
        say(f"page: {folder / 'index.html'}")
        if failed:
            raise SafemaxError(f"{len(failed)} failed, which the same command tries again: {'; '.join(failed)}")
