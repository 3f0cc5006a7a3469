"""Measure pure noise on the tasks of the emoji benchmark: the scores of a model whose erased outputs are N(0, I).

    python -m benchmarks.noise_ceiling

Latents drawn from N(0, I) are decoded by the embedded model and judged as if it had drawn them for the forget prompts.
Prints a Markdown table; writes nothing.
"""

from __future__ import annotations

import argparse

import torch
from safemax_sd.evaluation.inputs import judging_context
from safemax_sd.evaluation.options import JudgingOptions
from safemax_sd.evaluation.real import RealPictures, embedded_pictures
from torch import Tensor

from benchmarks.judging import measure
from benchmarks.results import markdown_line, markdown_table
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import load_suite, pick, suite_names

COLUMNS = ("unlearning_accuracy", "unlearning_accuracy_with_rejection", "neither", "halted")
SEED = 5_000_000
"""Seed of the noise, apart from the seeds that pictures are drawn from."""


def noise_pictures(count: int) -> Tensor:
    """Return decoded noise, [count, 3, 64, 64] in 0 to 1."""
    family = load_family(LoadOptions("emoji"))
    generator = torch.Generator().manual_seed(SEED)
    return family.decode(torch.randn((count, *family.latent_shape(None)), generator=generator))


def rates(task: str, pictures: Tensor, judge: Judge, *, real: RealPictures) -> dict[str, float]:
    """Return percentages by metric of pictures that are judged as those of a task's forget prompts."""
    suite = load_suite(task)
    context = judging_context(JudgingOptions(), suite, judge, real)
    results = measure(pictures, pick(suite.parts["forget"].prompts, len(pictures)), COLUMNS, context=context)
    return {name: result.value for name, result in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = [name for name in suite_names() if name.startswith("emoji/")]
    parser.add_argument("--tasks", nargs="*", default=tasks, choices=tasks)
    parser.add_argument("--num_images", type=int, default=256)
    arguments = parser.parse_args()
    pictures, judge, real = noise_pictures(arguments.num_images), load_judge(), embedded_pictures()
    print(markdown_table(["task", *COLUMNS], []), end="")
    for task in arguments.tasks:
        values = rates(task, pictures, judge, real=real)
        print(markdown_line([task, *(f"{values[column]:.1f}" for column in COLUMNS)]), flush=True)


if __name__ == "__main__":
    main()
