"""CLIP accuracy: percentage of pictures in which the judge prefers the prompt's concept to all others."""

from __future__ import annotations

from typing import ClassVar

from safemax_sd.evaluation.metrics.base import Batch, RateMetric, recognised
from safemax_sd.evaluation.metrics.description import Role
from torch import Tensor


class ClipAccuracy(RateMetric):
    """Zero-shot accuracy over the suite's concepts (CLIP, arXiv 2103.00020)."""

    name: ClassVar[str] = "clip_accuracy"
    label: ClassVar[str] = "Accuracy"
    note: ClassVar[str] = "the judge recognises the prompt’s concept"
    order: ClassVar[int] = 10
    higher_is_better: ClassVar[bool | None] = True
    subsets: ClassVar[tuple[str, ...]] = ("retain", "neighbours")
    swept: ClassVar[bool] = True
    comparison: ClassVar[tuple[Role, ...]] = (
        Role("retain", "retained", "retained", "kept prompts that the judge recognises", balanced=True, axis="y"),
        Role("neighbours", "neighbours", "neighbours", balanced=True),
    )

    def per_item(self, batch: Batch) -> Tensor:
        return recognised(batch, self.context)[0].float()
