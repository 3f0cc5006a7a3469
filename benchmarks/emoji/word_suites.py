"""Train on suites written from words and on those written by hand, and measure both on the hand-written prompts.

    python -m benchmarks.emoji.word_suites --wordnet /usr/share/wordnet --work_dir word_suites \\
      --output docs/results/DATE-word-suites.jsonl

Each task's words are the concepts of its forget file. Both trainings have the defaults and the same seed; both
evaluations draw the same prompts from the same noise. The embedded model's captions give the wording and what is
retained, as `docs/prompt_suites.md` says, and of a style its other styles. A row for each training is appended as soon
as it is measured, and not measured again. `--table` prints the rows as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from safemax_sd.evaluation.metrics.base import Result
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.outputs import evaluation_folder
from safemax_sd.evaluation.report import Report
from safemax_sd.evaluation.run import Evaluation, run_and_write
from safemax_sd.evaluation.subjects import Adapter

from benchmarks.emoji.settings import CONCEPT_TASKS, STYLES
from benchmarks.results import Row, append_rows, is_measured_with, markdown_table, read_rows
from safemax_sd.cli import main as safemax
from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.prompts import load_suite

TASKS = (*CONCEPT_TASKS, "style_blob")
STYLE = " style"
"""End of the names of styles in the suites' concept column."""
SOURCES = ("hand", "words")
MEASURED = {
    "UA, with rejection": ("unlearning_accuracy_with_rejection", "forget"),
    "paraphrases": ("unlearning_accuracy_with_rejection", "paraphrases"),
    "kept": ("clip_accuracy", "retain"),
    "neighbours": ("clip_accuracy", "neighbours"),
}
"""Metric and prompt subset of each column."""


@dataclass(frozen=True)
class Training:
    """A training on one task's suite of one source.

    Attributes:
        task: Name of the task, without `emoji/`.
        source: `hand`, or `words`.
        seed: Seed of training and evaluation.
    """

    task: str
    source: str
    seed: int

    def folder(self, work_dir: Path) -> Path:
        return work_dir / self.task / self.source / str(self.seed)


def write_from_words(task: str, wordnet: str, work_dir: Path) -> Path:
    """Write a task's suite from its words, unless it exists, and return its folder."""
    folder = work_dir / task / "suite"
    if folder.exists():
        return folder
    words = list(load_suite(f"emoji/{task}").parts["forget"].concepts)
    if words[0].endswith(STYLE):
        named = work_dir / "styles.txt"
        named.write_text("\n".join(STYLES) + "\n", encoding="utf8")
        words, more = [word.removesuffix(STYLE) for word in words], ["--kind", "style", "--concepts", str(named)]
    else:
        more = ["--kind", "object"]
    base = ("--pretrained_model_name_or_path", "emoji", "--wordnet", wordnet)
    run("prompts", *words, *more, *base, "--output_dir", str(folder))
    return folder


def run(*arguments: str) -> None:
    """Run a command of `safemax`.

    Raises:
        SafemaxError: The command failed; it has said why.
    """
    if safemax(list(arguments)):
        raise SafemaxError(f"safemax {arguments[0]} failed")


def train(training: Training, suite: Path, work_dir: Path) -> Path:
    """Train on a suite's prompts and return the output folder; a finished training is not repeated."""
    folder = training.folder(work_dir)
    if not (folder / "erasure.json").exists():
        prompts = (f"--{part}_prompts={suite / part}.csv" for part in ("forget", "retain"))
        run("train", *prompts, f"--output_dir={folder}", f"--seed={training.seed}", "--overwrite_output_dir")
    return folder


def evaluate(training: Training, adapter: Path, *, num_images: int, work_dir: Path) -> Report:
    """Evaluate an adapter on the task's hand-written suite."""
    suite = load_suite(f"emoji/{training.task}")
    options = EvaluateOptions(
        adapter=str(adapter), suite=suite.name, num_images=num_images, num_sweep_images=0, seed=training.seed
    )
    clock = Stopwatch()
    with evaluation_folder(options):
        evaluation = Evaluation(options, Adapter(adapter), suite=suite, base_cache_dir=work_dir / "cache")
        return run_and_write(evaluation, clock)[0]


def values_of(report: Report, model: str) -> dict[str, Result]:
    """Return a model's results by column."""
    found = {(row.metric, row.subset): row.result for row in report.metrics if row.model == model}
    return {column: found[key] for column, key in MEASURED.items()}


def measured(training: Training, arguments: argparse.Namespace) -> Row:
    """Train and evaluate, and return the row."""
    by_hand = Path("prompts/emoji") / training.task
    work: Path = arguments.work_dir
    suite = by_hand if training.source == "hand" else write_from_words(training.task, arguments.wordnet, work)
    adapter = train(training, suite, work)
    report = evaluate(training, adapter, num_images=arguments.num_images, work_dir=work)
    values = {
        model: {
            column: [result.value, result.interval, result.n] for column, result in values_of(report, model).items()
        }
        for model in ("base", "erased")
    }
    provenance = asdict(report.provenance)
    return {**asdict(training), "num_images": arguments.num_images, "values": values, "provenance": provenance}


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """Yield the table's line of each task, and of all pictures together, with seeds pooled.

    Pairs of task and seed that one source lacks are left out, so that both are measured on the same.
    """
    own = [{(row["task"], row["seed"]) for row in rows if row["source"] == source} for source in SOURCES]
    shared = [row for row in rows if (row["task"], row["seed"]) in set.intersection(*own)]
    for task in (*TASKS, None):
        chosen = [row for row in shared if task in (row["task"], None)]
        if chosen:
            rates = ([pooled(chosen, source, column) for source in SOURCES] for column in MEASURED)
            yield [task or "all", *(f"{hand:.1f}, {words:.1f}" for hand, words in rates)]


def pooled(rows: list[Row], source: str, column: str) -> float:
    """Return a rate over all pictures of a source's rows, in percent."""
    results = [row["values"]["erased"][column] for row in rows if row["source"] == source]
    return sum(value * n for value, _, n in results) / sum(n for _, _, n in results)


def measure(arguments: argparse.Namespace) -> None:
    """Measure the trainings that have no row yet, and append their rows.

    Raises:
        OptionError: The row of one has another number of pictures.
    """
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    settings, output = {"num_images": arguments.num_images}, arguments.output
    for seed, task, source in itertools.product(arguments.seeds, arguments.tasks, arguments.sources):
        training = Training(task, source, seed)
        if not is_measured_with(read_rows(output), asdict(training), settings, option="--output", path=output):
            append_rows(output, [json.loads(json.dumps(measured(training, arguments)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--wordnet", default="/usr/share/wordnet", help="WordNet's folder.")
    parser.add_argument("--work_dir", type=Path, default=Path("word_suites"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="Print the table of the rows that exist.")
    arguments = parser.parse_args()
    if not arguments.table:
        try:
            measure(arguments)
        except SafemaxError as error:
            parser.exit(2, f"error: {error}\n")
    print(markdown_table(["task", *MEASURED], lines(read_rows(arguments.output))), end="")


if __name__ == "__main__":
    main()
