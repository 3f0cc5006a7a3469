"""The plan of a run of attacks: which attacks, on which targets, under which conditions; it loads no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safemax_sd.evaluation.attacks.base import ATTACKS, Attack
from safemax_sd.evaluation.attacks.plain import Plain
from safemax_sd.evaluation.attacks.target import Role
from safemax_sd.evaluation.inputs import find_suite
from safemax_sd.evaluation.resistance.options import ALL, AttackOptions, ResistanceOptions
from safemax_sd.evaluation.resistance.report import AttackReport, attack_order
from safemax_sd.evaluation.subjects import Adapter

from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import json_text
from safemax_sd.prompts import Suite
from safemax_sd.results.erasure import BaseModel

NO_CONDITIONS = ("attacks", "adapter", "suite", "output_dir", "batch_size", "processes")
"""Options that no row depends on, and those that name what is a condition itself: the adapter's record, the prompts."""
CONTROLS = ("never_known", "untaught_dir")
"""Options on which only their own control's rows depend, so that a control may join or be left out later."""


def chosen(names: Sequence[str]) -> list[type[Attack]]:
    """Return the attacks of `--attacks`, those with the least access first; the plain prompts always come first.

    Raises:
        OptionError: No attack has that name.
    """
    found = {ATTACKS.get(name) for name in (ATTACKS.names() if ALL in names else names)}
    return sorted(found | {Plain}, key=lambda attack: attack_order(attack.name, attack.access))


@dataclass(frozen=True)
class Plan:
    """Attacks and their targets.

    Attributes:
        options: Options of the run.
        suite: Suite whose forbidden prompts are to show their concepts again.
        roles: Targets, in the order in which an attack runs on them.
        base_model: Model before the erasure.
        adapter: Erasure; None if only controls are attacked.
    """

    options: ResistanceOptions
    suite: Suite
    roles: tuple[Role, ...]
    base_model: BaseModel
    adapter: Adapter | None = None

    @classmethod
    def of_command(cls, options: AttackOptions) -> Self:
        """Plan attacks on an erasure and all its controls.

        Raises:
            OptionError: The folder is not a finished run's, or the suite cannot be loaded.
        """
        adapter = Adapter(Path(options.adapter))
        suite = find_suite(options.suite, adapter.record)
        roles: tuple[Role, ...] = ("erased", "base")
        if options.never_known is not None:
            roles = (*roles, "never_known")
        if options.untaught_dir is not None:
            roles = (*roles, "untaught")
        return cls(options, suite, roles, adapter.record.base_model, adapter)

    @cached_property
    def attacks(self) -> list[Attack]:
        """Attacks with their settings, in the order in which they run."""
        return [attack(attack.presets[self.options.preset]) for attack in chosen(self.options.attacks)]

    def missing(self, report: AttackReport) -> list[tuple[Attack, Role]]:
        """Return the attacks that a report lacks, each with its target."""
        pairs = [(attack, role) for attack in self.attacks for role in self.roles]
        return [(attack, role) for attack, role in pairs if not report.has(attack, role)]

    def differences(self, report: AttackReport) -> Iterator[tuple[str, object, object]]:
        """Yield name, value there and value here of each condition or setting in which a report differs."""
        for name, value in self.conditions().items():
            before = report.conditions.get(name)
            if before != value and not (name in CONTROLS and None in (before, value)):
                yield name, before, value
        for attack in self.attacks:
            own = as_stored(asdict(attack.settings))
            for row in report.rows:
                current = (row.attack, row.version) == (attack.name, attack.version)  # others are made anew
                if current and as_stored(row.settings) != own:
                    yield f"settings of {attack.name}", row.settings, own

    def check(self, report: AttackReport, folder: Path, keys: Mapping[str, str] | None = None) -> None:
        """Check that a report's attacks were run under the same conditions.

        Args:
            report: Report in the output folder.
            folder: Output folder.
            keys: The user's names of conditions if they are not those of the command's flags.

        Raises:
            OptionError: A condition or a setting is another; the first one is named.
        """
        for name, before, now in self.differences(report):
            named = (keys or {}).get(name, name)
            what = f"other {named}" if isinstance(now, dict) else f"{named} was {before}, is {now}"
            raise OptionError("--output_dir", folder, f"holds other attacks ({what}): name a new folder")

    def conditions(self) -> dict[str, Any]:
        """Return everything that rows depend on besides the attack and its settings, as `attacks.json` stores it.

        Models, controls and pictures are told apart by name alone, not by content.
        """
        options = {name: value for name, value in self.options.record().items() if name not in NO_CONDITIONS}
        if self.adapter is None:
            model: dict[str, Any] = {"base_model": self.base_model.public().name_or_path}
        else:
            model = {"adapter": self.adapter.record.public().to_json()}
        return as_stored({**options, **model, "prompts": self.suite.hashes})


def as_stored(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries as they are read back from JSON, with lists in place of tuples."""
    stored: dict[str, Any] = json.loads(json_text(content))
    return stored
