"""Search the settings of attacks on the base model and on erasures by other methods than SAFEMax.

    python -m benchmarks.emoji.attack_settings --adapter esd=no_bomb_esd --adapter salun=no_bomb_salun \\
      --work_dir attack_settings --output docs/results/DATE-attack-settings.jsonl

An attack is as strong as its settings. For each one that has a learning rate or a like strength, several values are
tried with a small budget; the presets take what brings the concept back best on these models, not on SAFEMax. A row
for each setting and target is appended as soon as it is measured; a killed run continues. `--table` prints the rows
as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from safemax_sd.evaluation.attacks.base import Attack
from safemax_sd.evaluation.attacks.classifier_guidance import ClassifierGuidance, ClassifierGuidanceSettings
from safemax_sd.evaluation.attacks.concept_inversion import ConceptInversion, ConceptInversionSettings
from safemax_sd.evaluation.attacks.fine_tuning import FineTuningSettings
from safemax_sd.evaluation.attacks.latent_classifier import ClassifierTraining
from safemax_sd.evaluation.attacks.p4d import P4D, P4DSettings
from safemax_sd.evaluation.attacks.plain import Plain
from safemax_sd.evaluation.attacks.relearning import Relearning
from safemax_sd.evaluation.attacks.ring_a_bell import RingABell, RingABellSettings
from safemax_sd.evaluation.attacks.second_lora import SecondLora, SecondLoraSettings
from safemax_sd.evaluation.attacks.state_inversion import StateInversion, StateInversionSettings
from safemax_sd.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk, UnlearnDiffAtkSettings
from safemax_sd.evaluation.attacks.vocabulary import Vocabulary
from safemax_sd.evaluation.resistance.options import ResistanceOptions

from benchmarks.emoji.attack_plans import plans_of
from benchmarks.results import Row, append_rows, is_measured_with, markdown_table, read_rows, weights_digest
from safemax_sd.core.errors import SafemaxError

PREFIX = UnlearnDiffAtkSettings(stages=5, iterations=20)
INVERSION = ConceptInversionSettings(batch_size=8, pictures=16)


def variants() -> dict[str, Attack]:
    """Return the attacks to try by their names in the table."""
    found: dict[str, Attack] = {"plain": Plain(Plain.presets["quick"])}
    for rate in (0.01, 0.03, 0.1):
        found[f"unlearn_diff_atk {rate}"] = UnlearnDiffAtk(replace(PREFIX, learning_rate=rate))
        found[f"p4d {rate}"] = P4D(P4DSettings(steps=60, draw_every=20, learning_rate=rate))
    found["unlearn_diff_atk 1 token"] = UnlearnDiffAtk(replace(PREFIX, tokens=1))
    searches = tuple((16, strength) for strength in (1.5, 3.0, 5.5))
    found["ring_a_bell"] = RingABell(RingABellSettings(searches, population=80, generations=150, prompts=4))
    found["concept_inversion"] = ConceptInversion(
        replace(INVERSION, tokens=(1, 4), learning_rates=(0.02, 0.08, 0.3), steps=600)
    )
    found["concept_inversion 1500 steps"] = ConceptInversion(
        replace(INVERSION, tokens=(4,), learning_rates=(0.005, 0.01, 0.02), steps=1500)
    )
    found["concept_inversion, lower rates"] = ConceptInversion(
        replace(INVERSION, tokens=(4, 6), learning_rates=(0.002, 0.005), steps=1500)
    )
    found["state_inversion, cooldown"] = StateInversion(StateInversionSettings((0.02, 0.05, 0.1, 0.2), 300))
    found["vocabulary"] = Vocabulary(Vocabulary.presets["quick"])
    scales = (5.0, 10.0, 25.0, 81.0, 193.0)
    found["classifier_guidance"] = ClassifierGuidance(
        ClassifierGuidanceSettings(scales, 64, ClassifierTraining(steps=500))
    )
    rates = (3e-4, 1e-3, 3e-3)
    found["relearning"] = Relearning(FineTuningSettings((3e-5, 1e-4, 3e-4), rates, (20, 50, 200)))
    found["relearning, higher rates"] = Relearning(FineTuningSettings((1e-3,), (1e-2,), (20, 50, 200)))
    found["second_lora"] = SecondLora(SecondLoraSettings(rates, (20, 50, 200)))
    return found


def tried(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Run what is missing, and yield the rows of the tries of each setting on each target.

    Raises:
        OptionError: The result file has a row with another seed or number of pictures, or of another adapter.
    """
    rows = read_rows(arguments.output)
    options = ResistanceOptions(suite=arguments.task, num_images=arguments.num_images, seed=arguments.seed)
    for name, attack in variants().items():
        for target, plan in plans_of(options, arguments.adapter, [attack]).items():
            key = {"task": arguments.task, "setting": name, "target": target}
            weights = None if plan.adapter is None else weights_digest(plan.adapter.folder)
            settings = {"num_images": arguments.num_images, "seed": arguments.seed, "weights": weights}
            if not is_measured_with(rows, key, settings, option="--output", path=arguments.output):
                report = plan.run(arguments.work_dir / arguments.task / name.replace(" ", "_") / target)
                common = {**key, **settings, "provenance": asdict(report.provenance)}
                yield [
                    {**common, "attack": row.attack, "try": each.name, **asdict(each.success)}
                    for row in report.rows
                    for each in row.tries
                ]


def task_of(row: Row) -> str:
    """Return a row's task; the oldest rows do not name theirs."""
    return str(row.get("task", "emoji/bomb"))


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """Yield the table's lines, one for each try of each setting on a task with its success on each target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    yield ["task", "setting", "try", *(f"{target} %" for target in targets)]
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((task_of(row), row["setting"], row["try"]), {})[row["target"]] = row
    for key, own in found.items():
        yield [*key, *(f"{own[target]['value']:.0f}" if target in own else "" for target in targets)]


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
        try:
            for rows in tried(arguments):
                append_rows(arguments.output, json.loads(json.dumps(rows)))
        except SafemaxError as error:
            parser.exit(2, f"error: {error}\n")
    head, *rest = lines(read_rows(arguments.output))
    print(markdown_table(head, rest), end="")


if __name__ == "__main__":
    main()
