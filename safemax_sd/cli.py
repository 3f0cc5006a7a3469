"""Erase concepts from text-to-image diffusion models by entropy maximization."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from safemax_sd.commands.app import app as serve_app
from safemax_sd.commands.attack import attack
from safemax_sd.commands.compare import compare
from safemax_sd.commands.console import OWN_FLAGS
from safemax_sd.commands.doctor import doctor
from safemax_sd.commands.erase import erase
from safemax_sd.commands.evaluate import evaluate
from safemax_sd.commands.export import export
from safemax_sd.commands.plan import plan
from safemax_sd.commands.presets import presets
from safemax_sd.commands.prompts import prompts
from safemax_sd.commands.quickstart import quickstart
from safemax_sd.commands.report import report
from safemax_sd.commands.suites import suites
from safemax_sd.commands.train import train

UsageError: Any = typer.BadParameter.__base__
"""Typer's error for a command line that it cannot parse; Typer does not export it."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OWN = (prompts, train, plan, erase)
"""Commands that parse their own flags."""
for command in (
    *(quickstart, doctor, prompts, train, plan, presets, erase),
    *(evaluate, attack, compare, export, report, suites, serve_app),
):
    app.command(context_settings=OWN_FLAGS if command in OWN else None)(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 2 for an error that the user can fix.

    Args:
        arguments: Words of the command line; None for this process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return app(words or ["--help"], prog_name="safemax", standalone_mode=False) or 0
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "safemax"  # type: ignore[attr-defined]
        text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        print(f"error: {text} ({command} --help)", file=sys.stderr)
        return 2
    except OSError as error:
        try:
            print(flush=True)  # tells whether standard output is what failed
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would add an error of its own
            print(f"error: standard output: cannot be written to ({error.strerror})", file=sys.stderr)
            return 2
        raise


if __name__ == "__main__":
    sys.exit(main())
