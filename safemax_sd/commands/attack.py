"""`safemax attack`: attacks on an erasure and on its controls."""

from __future__ import annotations

from safemax_sd.commands.console import one_line_errors, say
from safemax_sd.commands.flags import takes
from safemax_sd.evaluation.resistance.options import AttackOptions


@takes(AttackOptions)
def attack(options: AttackOptions) -> None:
    """Attack an erasure and its controls, to see what comes back; writes attacks.json and a page, and resumes."""
    with one_line_errors():
        from safemax_sd.evaluation.resistance.run import attack as run
        from safemax_sd.training.workers import process_state

        folder = run(options)
        if process_state().is_main_process:
            say(f"page: {folder / 'index.html'}")
