"""Attacks of a comparison: on the erased model of each cell, and once for each task and seed on the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemax_sd.evaluation.attacks.target import Role
from safemax_sd.evaluation.comparison.cell import Cell
from safemax_sd.evaluation.comparison.config import ATTACK_KEYS, CONTROLS, Comparison
from safemax_sd.evaluation.comparison.runs import Attempt
from safemax_sd.evaluation.resistance.options import ResistanceOptions
from safemax_sd.evaluation.resistance.plan import Plan, chosen
from safemax_sd.evaluation.resistance.report import AttackReport, Refusal
from safemax_sd.evaluation.resistance.run import run_plan
from safemax_sd.evaluation.subjects import Adapter

from safemax_sd.core.errors import failure_reason, path_errors
from safemax_sd.core.provenance import atomic_write_text
from safemax_sd.families import LoadOptions
from safemax_sd.results.erasure import BaseModel

FAILURE = "failure.txt"
"""File with the reason why attacks failed, beside their `attacks.json`."""


class SharedWork:
    """Work that does not depend on the attacked model, kept for one task and seed at a time.

    Runs of one task and seed follow each other, so that nothing is held longer than it is needed.
    """

    def __init__(self) -> None:
        self._of: tuple[str, int] | None = None
        self._shared: dict[str, Any] = {}

    def of(self, task: str, seed: int) -> dict[str, Any]:
        """Return `Task.shared` of a task and seed; that of any other is dropped."""
        if self._of != (task, seed):
            self._of, self._shared = (task, seed), {}
        return self._shared


@dataclass(frozen=True)
class AttackRun:
    """The attacks on one model, in a folder of their own.

    Attributes:
        cell: Cell whose erased model is attacked; for a control any cell of its task and seed.
        role: Target.
        options: Options of the attacks.
        folder: Folder of the attacks.
        work: Work that the attacks of a task and seed share.
    """

    cell: Cell
    role: Role
    options: ResistanceOptions
    folder: Path
    work: SharedWork

    @property
    def label(self) -> str:
        return self.cell.label if self.role == "erased" else self.role

    @property
    def seed(self) -> int:
        return self.cell.erasure.seed

    @property
    def name(self) -> str:
        return f"attacks on {self.label}, {self.cell.task}, seed {self.seed}"

    def plan(self) -> Plan:
        """Return the plan of the attacks; that on an erased model needs its cell to be done.

        Raises:
            OptionError: The record of the erasure is damaged.
        """
        erasure = self.cell.erasure
        if self.role != "erased":
            base_model = BaseModel.of(LoadOptions(erasure.base_model), family=None)
            return Plan(self.options, erasure.suite, (self.role,), base_model)
        adapter = Adapter(self.cell.folder)
        return Plan(self.options, erasure.suite, (self.role,), adapter.record.base_model, adapter)

    def ready(self) -> bool:
        """Tell whether there is a model to attack."""
        return self.role != "erased" or self.cell.state().get("status") == "done"

    def report(self) -> AttackReport | None:
        """Read the attacks that are done; None if there are none.

        Raises:
            OptionError: The file is damaged.
        """
        return AttackReport.find(self.folder, "--output_dir")

    def state(self) -> dict[str, Any]:
        """Return the status, one of those of a cell, and the reason if the attacks failed."""
        report, failure = self.report(), self.folder / FAILURE
        if report is not None and all(report.has(attack, self.role) for attack in chosen(self.options.attacks)):
            return {"status": "done"}
        if failure.is_file():
            return {"status": "failed", "reason": failure.read_text(encoding="utf8")}
        return {"status": "waiting" if report is None else "started"}

    def attempts(self) -> tuple[Attempt, ...]:
        """Return those of the configuration's attacks that are done, by their present versions, in the order of runs.

        Those whose success shows nothing by itself are left out: only `attacks.json` has their figures.
        """
        report = self.report()
        if report is None:
            return ()
        found = [report.outcome(attack, self.role) for attack in chosen(self.options.attacks)]
        return tuple(Attempt.of(each) for each in found if isinstance(each, Refusal) or (each and each.success_counts))

    def check(self) -> None:
        """Check that attacks that are done already were run under the same conditions.

        Raises:
            OptionError: A setting or the erasure is another, or a file is damaged.
        """
        report = self.report()
        if report is not None and self.ready():
            self.plan().check(report, self.folder, ATTACK_KEYS)

    def run(self) -> None:
        """Run the attacks that are not done yet; record a failure with its reason."""
        with path_errors("--output_dir", self.folder):
            (self.folder / FAILURE).unlink(missing_ok=True)
        try:
            run_plan(self.plan(), self.folder, self.work.of(self.cell.task, self.seed))
        except Exception as error:  # whatever fails, the other parts can still be run
            with path_errors("--output_dir", self.folder):
                atomic_write_text(self.folder / FAILURE, failure_reason(error))


Part = Cell | AttackRun


def with_attacks(comparison: Comparison, cells: Sequence[Cell]) -> list[Part]:
    """Put the attacks of each cell after it, and those of the controls of a task and seed before its first cell."""
    settings, parts, begun = comparison.settings, list[Part](), set[tuple[str, int]]()
    work = SharedWork()
    for cell in cells:
        suite, seed = cell.erasure.suite, cell.erasure.seed
        if settings.attacks and (cell.task, seed) not in begun:
            begun.add((cell.task, seed))
            parts += _controls(comparison, cell, work)
        parts.append(cell)
        if settings.attacks and cell.method.not_attacked is None:
            options = settings.resistance(suite, seed)
            parts.append(AttackRun(cell, "erased", options, cell.folder / "attacks", work))
    return parts


def _controls(comparison: Comparison, cell: Cell, work: SharedWork) -> list[AttackRun]:
    """Return the attacks on the controls of a cell's task and seed, which depend on no method."""
    known: list[tuple[Role, str | None]] = [("base", None)]
    if comparison.settings.never_known is not None:
        known.append(("never_known", comparison.settings.never_known))
    suite, seed = cell.erasure.suite, cell.erasure.seed
    return [
        AttackRun(
            cell,
            role,
            comparison.settings.resistance(suite, seed, never_known=folder),
            comparison.folder / CONTROLS / role / cell.task / str(seed),
            work,
        )
        for role, folder in known
    ]
