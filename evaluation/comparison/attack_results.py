"""Results of a comparison's attacks: their entries in compare.json and their table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

from safemax_sd.evaluation.attacks.base import Attack
from safemax_sd.evaluation.comparison.attack_table import TriesColumn, attack_columns, attack_grid
from safemax_sd.evaluation.comparison.attacking import AttackRun, Part
from safemax_sd.evaluation.comparison.cell import Cell
from safemax_sd.evaluation.comparison.config import Comparison
from safemax_sd.evaluation.comparison.runs import ATTACK_ENTRIES, BASE, NEVER_KNOWN, Attempt, Run
from safemax_sd.evaluation.comparison.tables import Grid, Summary, summaries
from safemax_sd.evaluation.resistance.plan import chosen


@dataclass(frozen=True)
class AttackOutcome:
    """The attacks on one model with their state.

    Attributes:
        part: Attacks.
        state: Status, and the reason if they failed.
        attempts: Attacks that are done or do not apply.
    """

    part: AttackRun
    state: Mapping[str, Any]
    attempts: tuple[Attempt, ...]

    @property
    def run(self) -> Run:
        """Attacks as a run without other measurements."""
        part = self.part
        objective = part.cell.method.name if part.role == "erased" else None
        return Run(part.label, objective, part.cell.task, part.seed, (), attacks=self.attempts)

    def to_json(self) -> dict[str, Any]:
        """Return status, reason and attacks as `compare.json` stores them."""
        rows = [attempt.to_json() for attempt in self.attempts]
        return {"status": self.state["status"], "reason": self.state.get("reason"), "rows": rows}


@dataclass(frozen=True)
class AttackResults:
    """The attacks of a comparison.

    Attributes:
        comparison: Configuration of the comparison.
        outcomes: Attacks on erased models and controls; none if the configuration asks for no attacks.
    """

    comparison: Comparison
    outcomes: Sequence[AttackOutcome]

    @classmethod
    def read(cls, comparison: Comparison, states: Sequence[tuple[Part, Mapping[str, Any]]]) -> Self:
        """Read all attacks that are done.

        Args:
            comparison: Configuration of the comparison.
            states: Cells and attacks, each with its state.

        Raises:
            OptionError: A file is damaged.
        """
        found = [(part, state) for part, state in states if isinstance(part, AttackRun)]
        return cls(comparison, [AttackOutcome(part, state, part.attempts()) for part, state in found])

    @cached_property
    def attacks(self) -> list[type[Attack]]:
        """Attacks of the configuration, in the order in which they run; none if it asks for none."""
        return chosen(self.comparison.settings.attacks) if self.outcomes else []

    @cached_property
    def columns(self) -> list[TriesColumn]:
        """Columns of the table, without attacks whose success shows nothing by itself."""
        attacks = [attack for attack in self.attacks if attack.success_counts]
        return attack_columns(attacks, [outcome.run for outcome in self.outcomes])

    @cached_property
    def table(self) -> list[Summary]:
        """Lines of the table, each with the number of runs whose attacks are all done."""
        planned = len(self.comparison.tasks) * len(self.comparison.seeds)
        runs = [outcome.run for outcome in self.outcomes if outcome.attempts]
        lines = summaries(runs, [BASE, NEVER_KNOWN, *self.comparison.methods], planned, self.columns)
        done = Counter(outcome.run.label for outcome in self.outcomes if outcome.state["status"] == "done")
        return [replace(line, runs=done[line.label]) for line in lines]

    def grids(self) -> list[Grid]:
        """Return the table as text; nothing if the configuration asks for no attacks."""
        if not self.outcomes:
            return []
        methods, labels = self.comparison.methods, {attack.name: attack.label for attack in self.attacks}
        not_attacked = {label: m.not_attacked for label, m in methods.items() if m.not_attacked is not None}
        tried = [attempt for outcome in self.outcomes for attempt in outcome.attempts]
        refusals = [f"{labels[attempt.attack]} ({attempt.refusal})" for attempt in tried if attempt.refusal]
        return [attack_grid(self.table, self.columns, list(methods), not_attacked, refusals)]

    def of_cell(self, cell: Cell) -> dict[str, Any]:
        """Return the entry that attacks add to a cell in `compare.json`; none if it has no attacks."""
        found = [outcome for outcome in self.outcomes if outcome.part.role == "erased" and outcome.part.cell is cell]
        return {"attacks": found[0].to_json()} if found else {}

    def to_json(self) -> dict[str, Any]:
        """Return the entry that attacks add to `compare.json`; none if the configuration asks for no attacks."""
        if not self.outcomes:
            return {}
        preset = self.comparison.settings.attack_preset
        controls = [
            {"label": each.part.label, "task": each.part.cell.task, "seed": each.part.seed, **each.to_json()}
            for each in self.outcomes
            if each.part.role != "erased"
        ]
        content = {
            "row_entries": list(ATTACK_ENTRIES),
            "settings": {attack.name: asdict(attack.presets[preset]) for attack in self.attacks},
            "summary": [summary.to_json() for summary in self.table],
            "controls": controls,
        }
        return {"attacks": content}
