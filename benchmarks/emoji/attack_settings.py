"""Search the settings of attacks on the base model and on erasures by other methods than SAFEMax.

    python -m benchmarks.emoji.attack_settings --adapter esd=no_bomb_esd --adapter salun=no_bomb_salun \\
      --work_dir attack_settings --output docs/results/DATE-attack-settings.jsonl

An attack is as strong as its settings. For each one that has a learning rate or a like strength, three values are tried
with the budget of the quick preset, or near it; what brings the concept back best is then fixed in the presets, before
SAFEMax is attacked. A row for each setting and target is appended as soon as it is measured; a killed run continues.
`--table` prints the rows as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from safemax_sd.evaluation.attacks.base import Attack
from safemax_sd.evaluation.attacks.classifier_guidance import ClassifierGuidance
from safemax_sd.evaluation.attacks.concept_inversion import ConceptInversion
from safemax_sd.evaluation.attacks.fine_tuning import FineTuningSettings
from safemax_sd.evaluation.attacks.p4d import P4D
from safemax_sd.evaluation.attacks.plain import Plain
from safemax_sd.evaluation.attacks.relearning import Relearning
from safemax_sd.evaluation.attacks.ring_a_bell import RingABell
from safemax_sd.evaluation.attacks.second_lora import SecondLora
from safemax_sd.evaluation.attacks.state_inversion import StateInversion
from safemax_sd.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from safemax_sd.evaluation.resistance.options import ResistanceOptions

from benchmarks.emoji.attack_plans import plans_of
from benchmarks.results import Row, append_rows, is_measured, markdown_table, read_rows


def variants() -> dict[str, Attack]:
    """Return the attacks to try by their names in the table."""
    found: dict[str, Attack] = {"plain": Plain(Plain.presets["quick"])}
    for rate in (0.01, 0.03, 0.1):
        found[f"unlearn_diff_atk {rate}"] = UnlearnDiffAtk(replace(UnlearnDiffAtk.presets["quick"], learning_rate=rate))
        found[f"p4d {rate}"] = P4D(replace(P4D.presets["quick"], learning_rate=rate))
    searches = tuple((16, strength) for strength in (1.5, 3.0, 5.5))
    found["ring_a_bell"] = RingABell(replace(RingABell.presets["quick"], searches=searches))
    quick = ConceptInversion.presets["quick"]
    found["concept_inversion"] = ConceptInversion(replace(quick, tokens=(1, 4), learning_rates=(0.02, 0.08, 0.3)))
    for steps in (100, 300):
        quick = replace(StateInversion.presets["quick"], steps=steps, learning_rates=(0.02, 0.05, 0.1))
        found[f"state_inversion {steps} steps"] = StateInversion(quick)
    found["classifier_guidance"] = ClassifierGuidance(
        replace(ClassifierGuidance.presets["quick"], scales=(5.0, 10.0, 25.0, 81.0, 193.0))
    )
    rates, steps_tried = (3e-4, 1e-3, 3e-3), (20, 50, 200)
    found["relearning"] = Relearning(FineTuningSettings((3e-5, 1e-4, 3e-4), rates, steps_tried))
    found["second_lora"] = SecondLora(replace(SecondLora.presets["quick"], learning_rates=rates))
    return found


def tried(arguments: argparse.Namespace) -> Iterator[tuple[str, str, list[Row]]]:
    """Run what is missing, and yield each setting's name, its target and the rows of its tries."""
    rows = read_rows(arguments.output)
    options = ResistanceOptions(suite=arguments.task, num_images=arguments.num_images, seed=arguments.seed)
    for name, attack in variants().items():
        for target, plan in plans_of(options, arguments.adapter, [attack]).items():
            if not is_measured(rows, {"setting": name, "target": target}):
                report = plan.run(arguments.work_dir / name.replace(" ", "_") / target)
                provenance = asdict(report.provenance)
                yield (
                    name,
                    target,
                    [
                        {"attack": row.attack, "try": each.name, **asdict(each.success), "provenance": provenance}
                        for row in report.rows
                        for each in row.tries
                    ],
                )


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """Yield the table's lines, one for each try of each setting with its success on each target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    yield ["setting", "try", *(f"{target} %" for target in targets)]
    for setting, one in dict.fromkeys((row["setting"], row["try"]) for row in rows):
        found = {row["target"]: row for row in rows if (row["setting"], row["try"]) == (setting, one)}
        cells = (f"{found[target]['value']:.0f}" if target in found else "" for target in targets)
        yield [setting, one, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="emoji/bomb")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--num_images", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=Path("attack_settings"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="Print the table of the rows that exist.")
    arguments = parser.parse_args()
    if not arguments.table:
        for setting, target, rows in tried(arguments):
            found = [{"setting": setting, "target": target, **row} for row in rows]
            append_rows(arguments.output, json.loads(json.dumps(found)))
    head, *rest = lines(read_rows(arguments.output))
    print(markdown_table(head, rest), end="")


if __name__ == "__main__":
    main()
