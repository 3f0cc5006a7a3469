"""Measure SAFEMax at several learning rates on one base model, and find the best one (docs/learning_rate.md).

    python -m benchmarks.emoji.rates --base_model emoji_build/width_32 --work_dir emoji_build/rates_32 \\
      --rates 1e-3 2e-3 4e-3 8e-3 1.6e-2 --output docs/results/DATE-rates.jsonl
    python -m benchmarks.emoji.rates --rank 64 --work_dir emoji_build/rank_64 --output docs/results/DATE-rates.jsonl
    python -m benchmarks.emoji.rates --output docs/results/DATE-rates.jsonl --table

Each rate erases emoji/tuning with two seeds, beside Prodigy, as one `safemax compare` that resumes. Unlearning and
retention hardly change over a factor of eight, so the criterion is the mean loss of the last hundred steps: that of
SAFEMax and its retain term alone; null if the training was stopped because it diverged. The best rate is the vertex of
the parabola, in the logarithm of the rate, through the lowest mean over seeds and its neighbours.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safemax_sd.evaluation.comparison.cell import STATE
from safemax_sd.evaluation.comparison.grid import compare

from benchmarks.results import Row, append_rows, is_measured, is_measured_with, markdown_table, read_rows
from safemax_sd.adapters.weights import attach
from safemax_sd.core.errors import SafemaxError
from safemax_sd.families import load_family
from safemax_sd.families.base import tuner_layers
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.learning_rate import width_of
from safemax_sd.training.output import LOG, read_log

TASK, SEEDS, LAST_STEPS = "emoji/tuning", (0, 1), 100
LOSSES = ("loss", "retain")
"""Entries of a training's log that rates are compared by."""
FLAGS = {"rank": 16, "train_batch_size": 6}
"""Flags of a training that the best rate may depend on, with their defaults, which the oldest rows do not state."""
SETTINGS = {
    "num_sweep_images": 0,
    "guidance_scale": 5.0,
    "num_inference_steps": 25,
    "sampler": "ddim",
    "clip_model": "emoji",
}
PRODIGY = "prodigy"


def label_of(rate: float) -> str:
    """Return a rate's label in the comparison: the digits after its point."""
    return f"rate{f'{rate:f}'.rstrip('0').partition('.')[2]}"


def width_of_base(base_model: str) -> float:
    """Return the width that `--learning_rate auto` goes by."""
    words = ["--forget_prompts", "f", "--retain_prompts", "r", "--output_dir", "o"]
    config = parse_config([*words, "--pretrained_model_name_or_path", base_model])
    family = load_family(config.load_options())
    attach(family, config)
    return width_of(tuner_layers(family.denoiser))


def measured(
    base_model: str, rates: Sequence[float], work_dir: Path, *, flags: Mapping[str, int], num_images: int
) -> Iterator[Row]:
    """Run a base model's comparison and yield the row of each training.

    Args:
        base_model: Name or folder of the base model.
        rates: Learning rates.
        work_dir: Folder of the comparison.
        flags: Flags of every training, `FLAGS`.
        num_images: Pictures of each kind in an evaluation.
    """
    shared = {"objective": "safemax", **flags}
    methods: dict[str, dict[str, Any]] = {label_of(rate): {**shared, "learning_rate": rate} for rate in rates}
    methods[PRODIGY] = {**shared, "optimizer": "prodigy", "learning_rate": 1.0}
    content = {"base_model": base_model, "tasks": [TASK], "seeds": list(SEEDS), **SETTINGS, "num_images": num_images}
    content["methods"] = methods
    work_dir.mkdir(parents=True, exist_ok=True)
    config = work_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf8")
    folder, failed = compare(str(config), str(work_dir))
    if other := [reason for reason in failed if "--learning_rate" not in reason]:
        raise SystemExit("\n".join(other))
    found = json.loads((folder / "compare.json").read_text(encoding="utf8"))
    values = {line["label"]: line["values"] for line in found["summary"]}
    width = width_of_base(base_model)
    for label, method in methods.items():
        for seed in SEEDS:
            cell = folder / label / TASK / str(seed)
            stopped = json.loads((cell / STATE).read_text(encoding="utf8"))["status"] == "failed"
            log = read_log(cell / LOG)[-LAST_STEPS:]
            yield {
                "base": Path(base_model).name,
                "width": width,
                "label": label,
                "rate": method["learning_rate"],
                **flags,
                "seed": seed,
                "num_images": num_images,
                **{name: None if stopped else statistics.fmean(row[name] for row in log) for name in LOSSES},
                "values of both seeds": values.get(label),
                "provenance": found["provenance"],
            }


def read_complete(path: Path) -> list[Row]:
    """Read the rows of a result file, each with all of `FLAGS`."""
    return [{**FLAGS, **row} for row in read_rows(path)]


def missing(found: Iterable[Row], rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows whose base model, label, flags and seed are in no existing row."""
    for row in found:
        if not is_measured(rows, {name: row[name] for name in ("base", "label", *FLAGS, "seed")}):
            yield row


def is_complete(rows: Sequence[Row], arguments: argparse.Namespace) -> bool:
    """Tell whether there is a row of every rate and of Prodigy with every seed.

    Raises:
        OptionError: One of them has another number of pictures.
    """
    common = {"base": Path(arguments.base_model).name, **{name: getattr(arguments, name) for name in FLAGS}}
    settings, output = {"num_images": arguments.num_images}, arguments.output
    labels = (*map(label_of, arguments.rates), PRODIGY)
    keys = [{**common, "label": label, "seed": seed} for label in labels for seed in SEEDS]
    # All of them are checked before the first is measured.
    found = [is_measured_with(rows, key, settings, option="--output", path=output) for key in keys]
    return all(found)


def measure(arguments: argparse.Namespace) -> None:
    """Run a base model's comparison and append the rows that do not exist yet, unless all do."""
    rows = read_complete(arguments.output)
    if not is_complete(rows, arguments):
        flags = {name: getattr(arguments, name) for name in FLAGS}
        found = measured(
            arguments.base_model, arguments.rates, arguments.work_dir, flags=flags, num_images=arguments.num_images
        )
        append_rows(arguments.output, missing(found, rows))


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the vertex of the parabola through the lowest loss and its neighbours; NaN if a neighbour is missing."""
    place = min(range(len(losses)), key=losses.__getitem__)
    if place in (0, len(losses) - 1) or math.isinf(losses[place + 1]):
        return math.nan
    (x0, x1, x2), (y0, y1, y2) = (
        [math.log(rate) for rate in rates[place - 1 : place + 2]],
        losses[place - 1 : place + 2],
    )
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    # Newton's form has the slope left + (right - left)·(2x - x0 - x1)/(x2 - x0), which is 0 at the vertex.
    return math.exp((x0 + x1) / 2 - left * (x2 - x0) / (right - left) / 2)


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield a line for each base model, rank, batch size and criterion, with mean losses by rate and the best rate."""
    groups = dict.fromkeys((row["base"], row["rank"], row["train_batch_size"]) for row in rows)
    for base, rank, batch in groups:
        own = [row for row in rows if (row["base"], row["rank"], row["train_batch_size"]) == (base, rank, batch)]
        rates = sorted({row["rate"] for row in own if row["label"] != PRODIGY})
        for name in LOSSES:
            losses = {rate: [row[name] for row in own if row["rate"] == rate] for rate in rates}
            means = [math.inf if None in each else statistics.fmean(each) for each in losses.values()]
            prodigy = statistics.fmean(row[name] for row in own if row["label"] == PRODIGY)
            found = [f"{rate:g}: {mean:.4f}" for rate, mean in zip(rates, means, strict=True)]
            yield [
                base,
                str(rank),
                str(batch),
                f"{own[0]['width']:.0f}",
                name,
                ", ".join(found),
                f"{prodigy:.4f}",
                f"{best_rate(rates, means):.2g}",
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="emoji")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    for name, default in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--work_dir", type=Path, default=Path("emoji_build/rates_64"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="Print the table of the rows that exist.")
    arguments = parser.parse_args()
    if not arguments.table:
        try:
            measure(arguments)
        except SafemaxError as error:
            parser.exit(2, f"error: {error}\n")
    heads = ["base", "rank", "batch", "w", "criterion", "mean of both seeds by rate", "Prodigy", "best rate"]
    print(markdown_table(heads, lines(read_complete(arguments.output))), end="")


if __name__ == "__main__":
    main()
