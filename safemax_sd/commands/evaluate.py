"""`safemax evaluate`: measurements of what an adapter forgets and retains."""

from __future__ import annotations

from safemax_sd.commands.console import console, one_line_errors, say
from safemax_sd.commands.flags import takes
from safemax_sd.evaluation.options import EvaluateOptions


@takes(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure what an adapter forgets and keeps; writes report.json and index.html."""
    with one_line_errors():
        run_evaluation(options)


def run_evaluation(options: EvaluateOptions) -> None:
    """Evaluate an adapter, and print the headline and the path of the page."""
    from safemax_sd.evaluation.headline import print_headline
    from safemax_sd.evaluation.report import REPORT, Report
    from safemax_sd.evaluation.run import evaluate as measure
    from safemax_sd.training.workers import process_state

    folder = measure(options)
    if not process_state().is_main_process:
        return
    print_headline(Report.read(folder / REPORT, "--output_dir"), console)
    say(f"page: {folder / 'index.html'}")
