"""CLIP accuracy: share of pictures in which the judge prefers the prompt's concept to all others."""

from __future__ import annotations

from typing import ClassVar

from safemax_sd.evaluation.metrics.base import Batch, RateMetric, recognised
from torch import Tensor


class ClipAccuracy(RateMetric):
    """Zero-shot accuracy over the suite's concepts (CLIP, arXiv 2103.00020)."""

    name: ClassVar[str] = "clip_accuracy"
    higher_is_better: ClassVar[bool | None] = True
    subsets: ClassVar[frozenset[str]] = frozenset({"retain", "neighbours"})

    def per_item(self, batch: Batch) -> Tensor:
        return recognised(batch, self.context)[0].float()
