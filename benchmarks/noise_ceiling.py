"""What the emoji benchmark's judge says of pure noise, task by task: the score of erased outputs that are N(0, I).

python -m benchmarks.noise_ceiling

Latents drawn from N(0, I) are decoded by the embedded model and measured as if the forbidden prompts had given them.
Prints a Markdown table; writes nothing.
"""

from __future__ import annotations

import argparse

import torch
from safemax_sd.evaluation.inputs import suite_concepts
from safemax_sd.evaluation.metrics import METRICS, Batch, Context
from safemax_sd.evaluation.metrics.features import JUDGE_EXTRACTOR
from safemax_sd.evaluation.real import RealPictures, embedded_pictures
from torch import Tensor

from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import load_suite, pick, suite_names

COLUMNS = ("unlearning_accuracy", "unlearning_accuracy_with_rejection", "neither", "halted")
SEED = 5_000_000
"""Beside the seeds of the benchmark's own pictures."""


def noise_pictures(count: int) -> Tensor:
    """Decoded noise, [count, 3, 64, 64] in 0 to 1."""
    family = load_family(LoadOptions("emoji"))
    generator = torch.Generator().manual_seed(SEED)
    return family.decode(torch.randn((count, *family.latent_shape(None)), generator=generator))


def rates(task: str, pictures: Tensor, judge: Judge, real: RealPictures) -> dict[str, float]:
    """Percentages, by metric, of pictures that stand for those of a task's forbidden prompts."""
    suite = load_suite(task)
    concepts = suite_concepts(suite)
    forbidden = suite.parts["forget"]
    context = Context(judge, concepts, real.thresholds(judge, concepts), None, JUDGE_EXTRACTOR, forbidden.concepts)
    names = [prompt.concept or "" for prompt in pick(forbidden.prompts, len(pictures))]
    batch = Batch(pictures, judge.encode_images(pictures), prompts=names, concepts=names)
    values = {}
    for column in COLUMNS:
        metric = METRICS.get(column)(context)
        metric.update(batch)
        values[column] = metric.compute().value
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = [name for name in suite_names() if name.startswith("emoji/")]
    parser.add_argument("--tasks", nargs="*", default=tasks, choices=tasks)
    parser.add_argument("--num_images", type=int, default=256)
    arguments = parser.parse_args()
    pictures, judge, real = noise_pictures(arguments.num_images), load_judge(), embedded_pictures()
    print(f"| task | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for task in arguments.tasks:
        values = rates(task, pictures, judge, real)
        print(f"| {task} | {' | '.join(f'{values[column]:.1f}' for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
