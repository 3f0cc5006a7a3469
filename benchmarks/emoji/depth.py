"""Attack erasures of a task and its controls through token states and weights, where the concept may still be known.

    python -m benchmarks.emoji.depth --task emoji/bomb --adapter default=no_bomb --adapter pruned=no_bomb_pruned \\
      --never_known benchmarks/emoji/never_known --output_dir emoji_build/depth

Besides the pictures without an attack (`plain`), the attacks are state inversion at the quick preset's two learning
rates, and relearning of all weights at two and of a LoRA at one. The strongest counts, for relearning at each number of
steps. The table in `docs/attacks.md` is older: its state inversion has constant rates of 0.05 and 0.1. Each target gets
a folder with attacks.json and its page; a killed run continues. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safemax_sd.evaluation.attacks.fine_tuning import FineTuningSettings
from safemax_sd.evaluation.attacks.plain import Plain
from safemax_sd.evaluation.attacks.relearning import Relearning
from safemax_sd.evaluation.attacks.state_inversion import StateInversion, StateInversionSettings
from safemax_sd.evaluation.resistance.curves import curves
from safemax_sd.evaluation.resistance.options import ResistanceOptions
from safemax_sd.evaluation.resistance.page import format_rate
from safemax_sd.evaluation.resistance.report import AttackRow

from benchmarks.emoji.attack_plans import plans_of
from benchmarks.results import markdown_line, markdown_table

INVERSION = StateInversionSettings(learning_rates=(0.02, 0.2), steps=300)
RELEARNING = FineTuningSettings(full_rates=(3e-4, 1e-3), lora_rates=(1e-2,), steps=(10, 20, 50, 100, 200))


def line(name: str, rows: tuple[AttackRow, ...]) -> str:
    """Return a target's line of the table."""
    by_attack = {row.attack: row for row in rows}
    lines = curves(by_attack[Relearning.name]).values()
    relearnt = [f"{max(curve[steps].value for curve in lines):.0f}" for steps in RELEARNING.steps]
    rates = [format_rate(by_attack[attack].success) for attack in (Plain.name, StateInversion.name)]
    return markdown_line([name, *rates, *relearnt])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="emoji/bomb")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--never_known")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("emoji_build/depth"))
    arguments = parser.parse_args()
    options = ResistanceOptions(
        suite=arguments.task,
        num_images=arguments.num_images,
        seed=arguments.seed,
        never_known=arguments.never_known,
    )
    attacks = (Plain(Plain.presets["quick"]), StateInversion(INVERSION), Relearning(RELEARNING))
    heads = ["target", "plain", "state inversion", *(f"relearnt {steps}" for steps in RELEARNING.steps)]
    lines = [
        line(name, plan.run(arguments.output_dir / arguments.task / name).rows)
        for name, plan in plans_of(options, arguments.adapter, attacks).items()
    ]
    print(markdown_table(heads, []) + "\n".join(lines))


if __name__ == "__main__":
    main()
