"""Verdicts of a judge on pictures that a benchmark draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safemax_sd.evaluation.metrics import METRICS, Batch, Context, Result
from safemax_sd.evaluation.metrics.base import wilson
from torch import Tensor

from safemax_sd.core.judge import Judge
from safemax_sd.prompts import Prompt

REJECTING = "unlearning_accuracy_with_rejection"


def measure(
    pictures: Tensor, prompts: Sequence[Prompt], metrics: Sequence[str], *, context: Context
) -> dict[str, Result]:
    """Measure pictures, [N, 3, H, W] in 0 to 1, of N prompts; return results by name of the metric."""
    batch = Batch(
        pictures,
        context.judge.encode_images(pictures),
        prompts=[prompt.text for prompt in prompts],
        concepts=[prompt.concept or "" for prompt in prompts],
    )
    results = {}
    for name in metrics:
        metric = METRICS.get(name)(context)
        metric.update(batch)
        results[name] = metric.compute()
    return results


def still_recognised(results: dict[str, Result]) -> Result:
    """Return the percentage of pictures that the judge recognises although it may reject them."""
    forgotten = results[REJECTING]
    return wilson(round(forgotten.n * (1 - forgotten.value / 100)), forgotten.n)


def named_correctly(judge: Judge, pictures: Tensor, names: Sequence[str], *, candidates: Sequence[str]) -> Result:
    """Return the percentage of pictures for which the judge picks the right name.

    Args:
        judge: Judge of the pictures.
        pictures: Pictures, [N, 3, H, W] in 0 to 1.
        names: Right name of each picture.
        candidates: Names of concepts or styles that the judge picks from.
    """
    picked = judge.similarities(pictures, judge.captions(candidates)).argmax(1)
    right = picked == torch.tensor([candidates.index(name) for name in names])
    return wilson(int(right.sum()), len(names))
