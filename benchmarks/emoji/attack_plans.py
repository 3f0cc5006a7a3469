"""Plans of attacks on erasures of the embedded model, with settings of a benchmark in place of a preset's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from safemax_sd.evaluation.attacks.base import Attack
from safemax_sd.evaluation.resistance.options import ResistanceOptions
from safemax_sd.evaluation.resistance.plan import Plan
from safemax_sd.evaluation.resistance.report import AttackReport
from safemax_sd.evaluation.resistance.run import run_plan
from safemax_sd.evaluation.subjects import Adapter

from safemax_sd.families import LoadOptions
from safemax_sd.prompts import load_suite
from safemax_sd.results.erasure import BaseModel


@dataclass(frozen=True)
class GivenPlan(Plan):
    """A plan with given attacks.

    Attributes:
        given: Attacks with their settings, in the order in which they run.
    """

    given: tuple[Attack, ...] = ()

    @cached_property
    def attacks(self) -> list[Attack]:
        return list(self.given)

    def run(self, folder: Path) -> AttackReport:
        """Run what a folder lacks, and return its report."""
        run_plan(self, folder)
        report = AttackReport.find(folder, "--output_dir")
        assert report is not None
        return report


def plans_of(options: ResistanceOptions, adapters: Sequence[str], attacks: Sequence[Attack]) -> dict[str, GivenPlan]:
    """Plan attacks on erasures, on the base model and, if `options` names it, on the control.

    Args:
        options: Options of the runs, with a shipped suite.
        adapters: Erasures as NAME=FOLDER.
        attacks: Attacks with their settings.

    Returns:
        The plan of each target by its name.
    """
    assert options.suite is not None
    suite, base, given = load_suite(options.suite), BaseModel.of(LoadOptions("emoji"), None), tuple(attacks)
    # Only the control's own rows depend on it; the others may have been attacked without it.
    alone = replace(options, never_known=None)
    found = {}
    for entry in adapters:
        name, _, folder = entry.partition("=")
        found[name] = GivenPlan(alone, suite, ("erased",), base, Adapter(Path(folder)), given)
    found["base"] = GivenPlan(alone, suite, ("base",), base, given=given)
    if options.never_known is not None:
        found["never_known"] = GivenPlan(options, suite, ("never_known",), base, given=given)
    return found
