"""Compare networks for the CIFAR-10 base model by what they have learned after some minutes on this machine.

    python -m benchmarks.classes.shapes --data_file cifar10.npz --classifier_file resnet56.safetensors --minutes 10

Trains the shapes by turns, each in its own folder in `study/cifar10_folded/shapes/` with its `progress.jsonl`, and
writes `shapes.md` beside them; a killed comparison goes on from the shapes' last saves.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.classes.base import BaseTraining, train_and_log
from benchmarks.classes.classifier import load_judged
from benchmarks.classes.data import add_data_options
from benchmarks.classes.progress import PROGRESS, ProgressLog
from benchmarks.classes.settings import SHAPES
from benchmarks.results import Row, markdown_table, read_rows
from benchmarks.training import positive

DATASET = "cifar10_folded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--minutes", type=positive, default=10.0, help="Minutes of training for each shape.")
    parser.add_argument("--turns", type=int, default=5, help="Turns of each shape; every one ends with a row.")
    add_data_options(parser)
    arguments = parser.parse_args()
    dataset, folder, classifier = load_judged(DATASET, arguments)
    folder = folder / "shapes"
    trainings, logs = {}, {}
    for name in arguments.shapes:
        settings = replace(SHAPES[name], minutes=arguments.minutes)
        trainings[name] = BaseTraining(dataset, folder / name, settings, label=name)
        logs[name] = ProgressLog(trainings[name].run, settings.batch_size, folder / name)
    for turn in range(arguments.turns):
        for name, training in trainings.items():
            train_and_log(training, logs[name], classifier, until=(turn + 1) / arguments.turns)
    rows = {name: read_rows(folder / name / PROGRESS)[-1] for name in trainings}
    (folder / "shapes.md").write_text(table(trainings, rows), encoding="utf8")
    print(table(trainings, rows))


def table(trainings: dict[str, BaseTraining], rows: dict[str, Row]) -> str:
    """Return a table of the shapes with their last rows."""
    head = ["shape", "weights, M", "minutes", "steps", "images/s", "loss", "recognised %", "with rejection %"]
    lines = []
    for name, row in rows.items():
        weights = sum(parameter.numel() for parameter in trainings[name].network.parameters()) / 1e6
        rate = trainings[name].settings.batch_size * row["step"] / (60 * row["minutes"])
        accuracy = [f"{row['class_accuracy']:.1f}", f"{row['class_accuracy_with_rejection']:.1f}"]
        lines.append(
            [
                f"`{name}`",
                f"{weights:.1f}",
                f"{row['minutes']:.1f}",
                row["step"],
                f"{rate:.0f}",
                f"{row['loss']:.4f}",
                *accuracy,
            ]
        )
    return markdown_table(head, lines)


if __name__ == "__main__":
    main()
