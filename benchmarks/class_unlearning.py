"""Repeat the published study: SAFEMax, Selective Amnesia and SalUn each forget one class of a class-conditional DDPM.

    python -m benchmarks.class_unlearning --dataset digits --methods safemax salun selective_amnesia --classes 0-9
    python -m benchmarks.class_unlearning --dataset digits --race 0 --repeats 3
    python -m benchmarks.class_unlearning --dataset digits --rates 0 --published_counts --repeats 3

Needs the `study` extra (scikit-learn). Trains or loads the base model and the classifier, runs every method on every
class and appends one JSON row for each run to `study/class_unlearning_<dataset>.jsonl`; existing rows are not measured
again, and one with other settings is an error. A killed run continues from its last checkpoint. Writes tables (`.md`),
a plot and pictures (`.png`) beside it. `--race CLASS` instead times whole runs of the methods in turn, until their last
step and until the first checkpoint at which the class is forgotten. `--rates CLASS` estimates the time of runs that
would take hours from a few steps and a small part of each prior, and measures memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.classes.base import is_trained, train_base
from benchmarks.classes.classifier import Classifier, load_judged
from benchmarks.classes.cost import part_of, seconds_by_parts, seconds_by_phase, seconds_of, step_memory
from benchmarks.classes.data import CLASSES, Dataset, add_data_options, write_folder
from benchmarks.classes.figures import gallery, plot
from benchmarks.classes.measure import SAMPLINGS, Subject, forgetting, kept_class, retention, verdict_on_noise
from benchmarks.classes.methods import SMALL, VARIANTS
from benchmarks.classes.settings import BASES
from benchmarks.classes.summary import summary
from benchmarks.prompt_files import write_prompts
from benchmarks.results import Row, append_rows, digest, is_measured_with, read_rows, weights_digest
from benchmarks.training import has_bfloat16
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.results.loading import load_result
from safemax_sd.train import train
from safemax_sd.training import checkpoints
from safemax_sd.training.config import TrainConfig, config_class
from safemax_sd.training.resume import FREE

DRAWN = ("class", "race")
"""Kinds of rows that measure pictures; the others measure steps alone."""
FORGOTTEN_AT = 99.0
"""Unlearning accuracy with rejection, in percent, at which a class counts as forgotten."""
GALLERY_ROWS, GALLERY_SEED = 3, 30_000_000
PART_PICTURES = 128
"""Number of real pictures of each class in a measurement on part of a run."""
TIMED_FRACTION = {"digits": 1.0, "cifar10": 0.25, "cifar10_folded": 1.0}
"""Fraction of the batch in a timed step. A published CIFAR-10 batch needs over 24 GB; time is proportional to size."""


class Study:
    """The runs and results of one data set.

    Args:
        arguments: Values of the command line.
        dataset: Data set.
        classifier: Classifier of its pictures.
        base: Folder of the base model.
    """

    def __init__(self, arguments: argparse.Namespace, dataset: Dataset, classifier: Classifier, *, base: Path) -> None:
        self.arguments, self.dataset, self.classifier, self.base = arguments, dataset, classifier, base
        self.folder: Path = arguments.work_dir / arguments.dataset
        self.results: Path = arguments.work_dir / f"class_unlearning_{arguments.dataset}"
        self.base_digest = weights_digest(base)
        own = SAMPLINGS[arguments.dataset]
        self.sampling = replace(
            own,
            num_forget=arguments.num_forget or own.num_forget,
            num_retain=arguments.num_retain or own.num_retain,
        )
        self.counts = "reduced" if arguments.dataset in SMALL and not arguments.published_counts else "published"
        # The base model keeps every class, so that ten rows share its pictures.
        self.kept_by_base = cache(partial(kept_class, self.subject(self.model(None))))

    @property
    def rows(self) -> list[Row]:
        """Rows of the result file, to which other processes may append as well."""
        return read_rows(self.results.with_suffix(".jsonl"))

    def prompt_files(self, forgotten: int) -> dict[str, str]:
        """Write the prompt files of a class; return their paths by flag.

        The retain prompts begin with the next class, which is the one that SalUn relabels the forgotten class as.
        """
        names = self.dataset.class_names
        parts = {"forget": [names[forgotten]], "retain": [*names[forgotten + 1 :], *names[:forgotten]]}
        folder = self.folder / "prompts"
        return {
            f"{part}_prompts": str(write_prompts(folder, f"{part}_{forgotten}", [(name, name) for name in classes]))
            for part, classes in parts.items()
        }

    def config(self, method: str, forgotten: int, output_dir: Path, **changes: Any) -> TrainConfig:
        flags = self.flags(method)
        if VARIANTS[method].real_data:
            flags["train_data_dir"] = str(write_folder(self.dataset, self.folder / "pictures"))
        return config_class(VARIANTS[method].objective)(
            **self.prompt_files(forgotten),
            pretrained_model_name_or_path=str(self.base),
            output_dir=str(output_dir),
            overwrite_output_dir=True,
            checkpoints_total_limit=1,
            **{**flags, **changes},
        )

    def flags(self, method: str) -> dict[str, Any]:
        """Return a method's flags besides those of files and folders."""
        flags = VARIANTS[method].flags_for(self.dataset.name, published=self.counts == "published")
        if self.sampling.bfloat16 and has_bfloat16():
            flags["mixed_precision"] = "bf16"
        return {**flags, "seed": self.arguments.seed}

    def training_settings(self, method: str) -> dict[str, Any]:
        """Return what a run's steps depend on besides its class: base model and flags, or the base model alone.

        Flags at their defaults are among them, so that another default in a later version is noticed.
        """
        found: dict[str, Any] = {"base": self.base_digest}
        if method != "base":
            flags = config_class(VARIANTS[method].objective)(**self.flags(method)).record()
            found |= {name: value for name, value in flags.items() if name not in FREE}
        return found

    def trained(self, method: str, forgotten: int) -> Path:
        """Return the folder of a finished run; start it, or continue it from its checkpoint, if it is not finished."""
        output = self.run_folder(method, forgotten)
        if not (output / RECORD).exists():
            resume_from = "latest" if checkpoints.all_checkpoints(output) else None
            train(self.config(method, forgotten, output, resume_from_checkpoint=resume_from))
        return output

    def row(self, method: str, forgotten: int) -> dict[str, Any]:
        """Train one method on one class and measure it."""
        output = self.trained(method, forgotten)
        measured = self.measure(output, forgotten)
        record = ErasureRecord.read(output)
        return {
            **measured,
            **seconds_of(record),
            "step_memory_bytes": step_memory(partial(self.part, method, forgotten)),
            "model_calls": record.cost.model_calls,
            "steps": record.cost.steps,
            "provenance": asdict(record.provenance),
        }

    def run_folder(self, method: str, forgotten: int) -> Path:
        # Without the counts of pictures: a finished run can be measured again with others.
        name = f"{method}_{forgotten}_{self.arguments.seed}_{self.counts}_{digest(self.training_settings(method))}"
        return self.folder / "runs" / name

    def settings(self, key: Row) -> dict[str, Any]:
        """Return what a row depends on besides its key: `training_settings` and, if it has pictures, those of these.

        Values are as they are read back from JSON.
        """
        found = self.training_settings(key["method"])
        if key["kind"] in DRAWN:
            found["classifier"] = self.classifier.digest
            found |= {f"sampling_{name}": value for name, value in asdict(self.sampling).items()}
        stored: dict[str, Any] = json.loads(json.dumps(found))
        return stored

    def key(self, method: str, forgotten: int) -> dict[str, Any]:
        return {
            "dataset": self.dataset.name,
            "method": method,
            "class": forgotten,
            "seed": self.arguments.seed,
            "counts": self.counts,
        }

    def model(self, output: Path | None) -> ModelFamily:
        return load_family(LoadOptions(str(self.base))) if output is None else load_result(output)

    def measure(self, output: Path | None, forgotten: int) -> dict[str, Any]:
        """Measure forgetting and retention of a run; of the base model if `output` is None."""
        subject = self.subject(self.model(output))
        judged = self.kept_by_base if output is None else partial(kept_class, subject)
        return {
            **forgetting(subject, forgotten),
            **retention(judged, self.dataset, self.classifier, forgotten=forgotten),
        }

    def subject(self, family: ModelFamily) -> Subject:
        return Subject(family, self.dataset, self.classifier, self.sampling)

    def part(self, method: str, forgotten: int, batch_fraction: float) -> TrainConfig:
        """Return the configuration of a run with a small part of the priors and a fraction of each batch."""
        whole = self.config(method, forgotten, self.folder / "part_of_a_run")
        if not VARIANTS[method].real_data:
            return part_of(whole, batch_fraction)
        pictures = write_folder(self.dataset, self.folder / "part", limit=PART_PICTURES)
        return replace(part_of(whole, batch_fraction), train_data_dir=str(pictures))

    def rates(self, forgotten: int) -> None:
        """Estimate the seconds of each method's whole run, the methods in turn, and measure its step's memory once."""
        for method in self.arguments.methods:
            key = {"kind": "memory", **self.key(method, forgotten)}
            if not self.has(key):
                self.append(key, {"step_memory_bytes": step_memory(partial(self.part, method, forgotten))})
        for repeat in range(self.arguments.repeats):
            for method in self.arguments.methods:
                key = {"kind": "rates", **self.key(method, forgotten), "repeat": repeat}
                if not self.has(key):
                    whole = self.config(method, forgotten, self.folder / "rates")
                    fraction = TIMED_FRACTION[self.dataset.name]
                    self.append(key, seconds_by_parts(whole, self.part(method, forgotten, fraction), fraction))

    def race(self, forgotten: int) -> None:
        """Time whole runs of the methods in turn, priors included; see `times`."""
        for repeat in range(self.arguments.repeats):
            for method in self.arguments.methods:
                key = {"kind": "race", **self.key(method, forgotten), "repeat": repeat}
                if self.has(key):
                    continue
                output = self.folder / "race" / method
                config = self.config(method, forgotten, output, checkpoints_total_limit=None)
                config.checkpointing_steps = max(1, config.max_train_steps // 40)
                train(config)
                self.append(key, self.times(output, forgotten))
                shutil.rmtree(output)

    def times(self, output: Path, forgotten: int) -> dict[str, Any]:
        """Find out when a run had forgotten its class, by its checkpoints and its final weights, and when it ended.

        Returns:
            Seconds of priors and steps, until the end and until the class is first found forgotten (None if it never
            is), with the steps. The time in which checkpoints are written counts in neither.
        """
        record = ErasureRecord.read(output)
        stages: list[tuple[int, Path | None, Mapping[str, float]]] = []
        for path in checkpoints.all_checkpoints(output):
            cost = json.loads((path / checkpoints.COST).read_text(encoding="utf8"))
            stages.append((checkpoints.step_of(path), path, cost["seconds"]))
        stages.append((record.cost.steps, None, record.cost.seconds))
        reached: dict[str, Any] = {"seconds_to_forgotten": None, "steps_to_forgotten": None}
        for step, weights, seconds in stages:
            measured = forgetting(self.subject(load_result(output, weights=weights)), forgotten)
            if measured["unlearning_accuracy_with_rejection"] >= FORGOTTEN_AT:
                reached = {"seconds_to_forgotten": sum(seconds_by_phase(seconds)), "steps_to_forgotten": step}
                break
        priors, training = seconds_by_phase(record.cost.seconds)
        return {
            "seconds": priors + training,
            "seconds_priors": priors,
            **reached,
            "steps": record.cost.steps,
            "provenance": asdict(record.provenance),
        }

    def append(self, key: Row, found: dict[str, Any]) -> None:
        """Append a row, unless another process has measured the same meanwhile."""
        if not self.has(key):
            append_rows(self.results.with_suffix(".jsonl"), [{**key, **found, "settings": self.settings(key)}])

    def has(self, key: Row) -> bool:
        """Tell whether a row with these entries exists.

        Raises:
            OptionError: It was measured with other settings.
        """
        path = self.results.with_suffix(".jsonl")
        return is_measured_with(self.rows, key, self.settings(key), option="--work_dir", path=path)

    def run(self) -> None:
        for forgotten in self.arguments.classes:
            for method in ("base", *self.arguments.methods):
                key = {"kind": "class", **self.key(method, forgotten)}
                if method == "base":
                    key |= {"seed": None, "counts": None}  # the base model has neither
                if self.has(key):
                    continue
                row = self.measure(None, forgotten) if method == "base" else self.row(method, forgotten)
                self.append(key, row)
                print(
                    f"{method} class {forgotten}: UA {row['unlearning_accuracy']:.1f} %, with rejection "
                    f"{row['unlearning_accuracy_with_rejection']:.1f} %, H {row['entropy']:.3f}, FID {row['fid']:.3f}",
                    flush=True,
                )

    def draw_gallery(self) -> None:
        """Draw pictures of every method: of the class that each run forgot, and of the next class.

        Raises:
            OptionError: Only a run's row is left, not its folder.
        """
        for method, forgotten in itertools.product(self.arguments.methods, self.arguments.classes):
            output = self.run_folder(method, forgotten)
            if not (output / RECORD).exists():
                raise OptionError("--work_dir", output, "is missing: pictures need the runs of all rows")
        blocks: dict[str, list[Tensor]] = {}
        for method in ("base", *self.arguments.methods):
            asked: list[list[Tensor]] = [[], []]
            for forgotten in self.arguments.classes:
                family = self.model(None if method == "base" else self.run_folder(method, forgotten))
                for offset, drawn in enumerate(asked):
                    number = (forgotten + offset) % len(self.dataset.class_names)
                    drawn.append(self.subject(family).pictures(number, GALLERY_ROWS, GALLERY_SEED))
            blocks[method] = [torch.stack(drawn, 1).flatten(0, 1) for drawn in asked]
        gallery(blocks, len(self.arguments.classes)).savefig(f"{self.results}_pictures.png", dpi=110)

    def summarize(self) -> None:
        """Write the tables and the plot of all existing rows."""
        rows = self.rows
        self.results.with_suffix(".md").write_text(summary(rows), encoding="utf8")
        if any(row["kind"] == "class" for row in rows):
            plot(rows).savefig(self.results.with_suffix(".png"), dpi=130)
        print(f"tables: {self.results.with_suffix('.md')}")


def check_options(arguments: argparse.Namespace) -> None:
    """Check what would otherwise fail, or have no effect, only after models were trained.

    Raises:
        OptionError: A class does not exist, or `--base_minutes` is given although there is a base model.
    """
    asked = {"--classes": arguments.classes, "--race": [arguments.race], "--rates": [arguments.rates]}
    for option, numbers in asked.items():
        for number in numbers:
            if number is not None and not 0 <= number < CLASSES:
                raise OptionError(option, number, f"is no class: they are numbered 0 to {CLASSES - 1}")
    base = arguments.work_dir / arguments.dataset / "base"
    if arguments.base_minutes is not None and is_trained(base):
        text = f"has no effect, as {base} holds a base model: leave it out, or give another --work_dir"
        raise OptionError("--base_minutes", arguments.base_minutes, text)


def open_study(arguments: argparse.Namespace) -> Study:
    """Load the data set, and load or train the base model and the classifier.

    Raises:
        OptionError: See `check_options`.
    """
    check_options(arguments)
    dataset, folder, classifier = load_judged(arguments.dataset, arguments)
    settings = BASES[arguments.dataset]
    if arguments.base_minutes is not None:
        settings = replace(settings, minutes=arguments.base_minutes, stored=None)
    return Study(arguments, dataset, classifier, base=train_base(dataset, folder / "base", settings))


def run_study(study: Study) -> None:
    """Measure what the command line asks for; write the tables, and last the pictures, which need the runs' folders."""
    print(f"classifier: {100 * study.classifier.accuracy:.2f} % of {len(study.dataset.test)} test pictures")
    print(f"classifier on {verdict_on_noise(study.model(None), study.dataset, study.classifier)}", flush=True)
    if study.arguments.race is not None:
        study.race(study.arguments.race)
    elif study.arguments.rates is not None:
        study.rates(study.arguments.rates)
    else:
        study.run()
    study.summarize()
    if study.arguments.race is None and study.arguments.rates is None:
        study.draw_gallery()


def classes(text: str) -> list[int]:
    """Read the numbers in a text such as `0-9` or `2,5`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text} names no class")
    return numbers


def picture_count(least: int) -> Callable[[str], int]:
    """Return a function that reads a number of pictures of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text}")
        return int(text)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(BASES), default="digits")
    methods = ["safemax", "salun", "selective_amnesia"]
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS), default=methods)
    parser.add_argument("--classes", type=classes, default=list(range(10)))
    parser.add_argument("--race", type=int, metavar="CLASS", help="Time whole runs of the methods on this class.")
    parser.add_argument("--rates", type=int, metavar="CLASS", help="Estimate the time of runs from their parts.")
    parser.add_argument("--repeats", type=int, default=3, help="Repeats of --race and --rates.")
    parser.add_argument("--published_counts", action="store_true", help="Published counts of steps and priors.")
    parser.add_argument("--base_minutes", type=float, help="Minutes of the base model's training.")
    parser.add_argument("--num_forget", type=picture_count(1), help="Pictures drawn of the forgotten class.")
    # One of each kept class is the least that can be measured.
    each = picture_count(CLASSES - 1)
    parser.add_argument("--num_retain", type=each, help="Pictures drawn of all kept classes together.")
    parser.add_argument("--seed", type=int, default=0)
    add_data_options(parser)
    arguments = parser.parse_args()
    try:
        run_study(open_study(arguments))
    except SafemaxError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
