"""`safemax plan`: what a training would take, from the model's configurations alone."""

from __future__ import annotations

import typer

from safemax_sd.commands.console import one_line_errors, say


def plan(context: typer.Context) -> None:
    """Plan a training: the same flags as `safemax train`, and --device and --measure (see `safemax plan --help`)."""
    from safemax_sd.planning.options import PlanOptions
    from safemax_sd.planning.plan import describe, make_plan
    from safemax_sd.training.command_line import parse_config

    with one_line_errors():
        description = "Say what a training would take; nothing is written."
        config = parse_config(context.args, own=PlanOptions, prog="safemax plan", description=description)
        for line in describe(make_plan(config)):
            say(line)
