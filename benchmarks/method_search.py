"""Choose each trained method's learning rate and steps by the same small search, on a task of its own.

    python -m benchmarks.method_search --work_dir search --output docs/results/DATE-emoji-search.jsonl
    python -m benchmarks.method_search --output docs/results/emoji_search.jsonl --table

Every method of `benchmarks/emoji/search.yaml` gets as many trials: its flags there, the same with 5 and with 25 times
the learning rate, and the best of these three with twice the steps. `examples/compare_emoji.yaml` runs the best. The
criterion was fixed before the first trial: the highest harmonic mean of UA, retained, neighbour and paraphrase accuracy
on `emoji/tuning`. One JSON row a trial; trials that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safemax_sd.evaluation.comparison.columns import HARMONIC
from safemax_sd.evaluation.comparison.grid import compare

from benchmarks.class_unlearning import read_rows
from benchmarks.emoji.methods import SEARCH, trained_methods
from safemax_sd.core.errors import SafemaxError
from safemax_sd.train import LOSS_NOT_FINITE
from safemax_sd.training.config import config_class

RATES, LONGER = (1, 5, 25), 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One setting of a method.

    Attributes:
        method: Its label.
        flags: All that differ from the objective's defaults.
        rate: Multiple of the learning rate.
        steps: Multiple of the steps.
    """

    method: str
    flags: dict[str, Any]
    rate: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.method}-rate{self.rate}-steps{self.steps}"

    def row(self, work_dir: Path) -> Row:
        """Erase and measure; a setting that diverges has no values.

        Raises:
            SafemaxError: It failed otherwise, which says nothing of the setting, or another process is at it.
        """
        content = {**yaml.safe_load(SEARCH.read_text(encoding="utf8")), "methods": {self.name: self.flags}}
        config = work_dir / f"{self.name}.yaml"
        config.write_text(yaml.safe_dump(content), encoding="utf8")
        folder, failed = compare(str(config), str(work_dir / self.method))
        found = json.loads((folder / "compare.json").read_text(encoding="utf8"))
        lines = [line["values"] for line in found["summary"] if line["label"] == self.name]
        if failed and LOSS_NOT_FINITE not in failed[0]:
            raise SafemaxError(failed[0])
        if not lines and not failed:
            raise SafemaxError(f"{self.name} is being run by another process")
        return {
            "method": self.method,
            "rate": self.rate,
            "steps": self.steps,
            "flags": self.flags,
            "values": lines[0] if lines else None,
            "failed": failed[0] if failed else None,
            "provenance": found["provenance"],
        }


def trial(method: str, *, rate: int, steps: int) -> Trial:
    """A method's setting with multiples of its learning rate and steps."""
    flags = trained_methods(SEARCH)[method]
    config = config_class(flags["objective"])
    own = {"learning_rate": config.learning_rate, "max_train_steps": config.max_train_steps, **flags}
    changed = {"learning_rate": own["learning_rate"] * rate, "max_train_steps": own["max_train_steps"] * steps}
    return Trial(method, {**flags, **changed}, rate, steps)


def quality(row: Row) -> float:
    """By the criterion; a failed trial is the worst."""
    return -1.0 if row["values"] is None else float(row["values"][HARMONIC]["value"])


def best(rows: list[Row], method: str) -> Row:
    """The trial to take."""
    return max((row for row in rows if row["method"] == method), key=quality)


def search(method: str, work_dir: Path, output: Path) -> None:
    """Run a method's trials that are not there yet."""
    for rate in RATES:
        run(trial(method, rate=rate, steps=1), work_dir, output)
    # Where the longer trial is there, the best has its rate, be it that one or the one it was made of.
    run(trial(method, rate=best(read_rows(output), method)["rate"], steps=LONGER), work_dir, output)


def run(one: Trial, work_dir: Path, output: Path) -> None:
    """Append a trial's row, unless it is there."""
    place = (one.method, one.rate, one.steps)
    if any((row["method"], row["rate"], row["steps"]) == place for row in read_rows(output)):
        return
    row = one.row(work_dir)
    with output.open("a", encoding="utf8") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: list[Row]) -> str:
    """Markdown: a line a trial, the chosen ones marked."""
    rates, costs = ("ua", "paraphrases", "retained", "neighbours", HARMONIC), ("seconds", "model_calls")
    headings = [name.replace("_", " ") for name in ("method", "learning_rate", "steps", *rates, *costs)]
    lines = [f"| {' | '.join(headings)} | |", "|" + "---|" * (len(headings) + 1)]
    for row in rows:
        values = row["values"]
        cells = ["failed"] * len(rates + costs)
        if values is not None:
            cells = [f"{values[name]['value']:.1f}" for name in rates]
            cells += [f"{values[name]['value']:,.0f}" for name in costs]
        mark = "chosen" if row is best(rows, row["method"]) else ""
        rate, steps = row["flags"]["learning_rate"], row["flags"]["max_train_steps"]
        lines.append(f"| {row['method']} | {rate:.3g} | {steps} | {' | '.join(cells)} | {mark} |")
    return "\n".join(lines)


def main() -> None:
    methods = list(trained_methods(SEARCH))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("emoji_build") / "search")
    parser.add_argument("--output", type=Path, default=Path("emoji_search.jsonl"))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--table", action="store_true", help="Print what is there instead.")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_rows(arguments.output)))
        return
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        for method in arguments.methods:
            search(method, arguments.work_dir, arguments.output)
    except SafemaxError as error:
        sys.exit(f"error: {error}; the same command goes on from here")


if __name__ == "__main__":
    main()
