"""Choose learning rate and steps of each trained method by the same small search, on a task kept for this purpose.

    python -m benchmarks.method_search --work_dir search --output docs/results/DATE-emoji-search.jsonl
    python -m benchmarks.method_search --output docs/results/emoji_search.jsonl --table

Every method of `benchmarks/emoji/search.yaml` gets four trials: its flags there, the same with 5 and with 25 times the
learning rate, and the best of these three with twice the steps. `examples/compare_emoji.yaml` uses the best trial. The
criterion was fixed before the first trial: the highest harmonic mean of unlearning, retain, neighbour and paraphrase
accuracy on `emoji/tuning`. Each trial is a JSON row; existing trials are not run again.
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

from benchmarks.emoji.methods import SEARCH, trained_methods
from benchmarks.results import Row, append_rows, is_measured_with, markdown_table, read_rows
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.train import DIVERGES, LOSS_NOT_FINITE
from safemax_sd.training.config import config_class

RATES, LONGER = (1, 5, 25), 2


@dataclass(frozen=True)
class Trial:
    """One setting of a method.

    Attributes:
        method: Label of the method.
        flags: All flags that differ from the objective's defaults.
        rate: Factor of the learning rate.
        steps: Factor of the number of steps.
    """

    method: str
    flags: dict[str, Any]
    rate: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.method}-rate{self.rate}-steps{self.steps}"

    def row(self, work_dir: Path) -> Row:
        """Erase, measure and return the row of the trial; a trial that diverges has no values.

        Raises:
            SafemaxError: The trial failed for another reason, or another process is running it.
        """
        content = {**yaml.safe_load(SEARCH.read_text(encoding="utf8")), "methods": {self.name: self.flags}}
        config = work_dir / f"{self.name}.yaml"
        config.write_text(yaml.safe_dump(content), encoding="utf8")
        folder, failed = compare(str(config), str(work_dir / self.method))
        found = json.loads((folder / "compare.json").read_text(encoding="utf8"))
        lines = [line["values"] for line in found["summary"] if line["label"] == self.name]
        if failed and not any(beginning in failed[0] for beginning in (LOSS_NOT_FINITE, DIVERGES)):
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
    """Return a method's trial with its learning rate and number of steps multiplied."""
    flags = trained_methods(SEARCH)[method]
    config = config_class(flags["objective"])
    own = {"learning_rate": config.learning_rate, "max_train_steps": config.max_train_steps, **flags}
    changed = {"learning_rate": own["learning_rate"] * rate, "max_train_steps": own["max_train_steps"] * steps}
    return Trial(method, {**flags, **changed}, rate, steps)


def quality(row: Row) -> float:
    """Return the harmonic mean in percent; -1 for a failed trial."""
    return -1.0 if row["values"] is None else float(row["values"][HARMONIC]["value"])


def best(rows: list[Row], method: str) -> Row:
    """Return the best trial of a method."""
    return max((row for row in rows if row["method"] == method), key=quality)


def search(method: str, work_dir: Path, output: Path) -> None:
    """Run those trials of a method that do not exist yet."""
    for rate in RATES:
        run(trial(method, rate=rate, steps=1), work_dir, output)
    # An existing longer trial does not change the choice: it has the rate of the best shorter one.
    run(trial(method, rate=best(read_rows(output), method)["rate"], steps=LONGER), work_dir, output)


def run(one: Trial, work_dir: Path, output: Path) -> None:
    """Run a trial and append its row, unless it exists.

    Raises:
        OptionError: It exists with other flags.
    """
    key = {"method": one.method, "rate": one.rate, "steps": one.steps}
    if not is_measured_with(read_rows(output), key, {"flags": one.flags}, option="--output", path=output):
        append_rows(output, [one.row(work_dir)])


def table(rows: list[Row]) -> str:
    """Return a Markdown table with a line for each trial, the chosen ones marked."""
    rates, costs = ("ua", "paraphrases", "retained", "neighbours", HARMONIC), ("seconds", "model_calls")
    headings = [name.replace("_", " ") for name in ("method", "learning_rate", "steps", *rates, *costs)]
    lines = []
    for row in rows:
        values = row["values"]
        cells = ["failed"] * len(rates + costs)
        if values is not None:
            cells = [f"{values[name]['value']:.1f}" for name in rates]
            cells += [f"{values[name]['value']:,.0f}" for name in costs]
        mark = "chosen" if row is best(rows, row["method"]) else ""
        rate, steps = row["flags"]["learning_rate"], row["flags"]["max_train_steps"]
        lines.append([row["method"], f"{rate:.3g}", steps, *cells, mark])
    return markdown_table([*headings, ""], lines)


def main() -> None:
    methods = list(trained_methods(SEARCH))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("emoji_build") / "search")
    parser.add_argument("--output", type=Path, default=Path("emoji_search.jsonl"))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--table", action="store_true", help="Print the existing trials; run none.")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_rows(arguments.output)), end="")
        return
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        for method in arguments.methods:
            search(method, arguments.work_dir, arguments.output)
    except OptionError as error:
        parser.exit(2, f"error: {error}\n")
    except SafemaxError as error:
        sys.exit(f"error: {error}; the same command continues from here")


if __name__ == "__main__":
    main()
