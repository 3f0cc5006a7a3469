"""CLIP score: how well pictures fit their prompts."""

from __future__ import annotations

from typing import ClassVar

from safemax_sd.evaluation.metrics.base import Batch, PerItemMetric
from torch import Tensor


class ClipScore(PerItemMetric):
    """CLIP score: 100 · max(cos(picture, prompt), 0) (arXiv 2104.08718, eq. 1, with weight 100)."""

    name: ClassVar[str] = "clip_score"
    label: ClassVar[str] = "CLIP score"
    order: ClassVar[int] = 40
    higher_is_better: ClassVar[bool | None] = True
    subsets: ClassVar[tuple[str, ...]] = ("retain", "neighbours")

    def per_item(self, batch: Batch) -> Tensor:
        texts = self.context.judge.encode_texts(list(batch.prompts))
        return 100 * (batch.features * texts).sum(1).clamp(min=0)
