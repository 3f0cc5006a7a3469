"""Drift: how far an erasure moves pictures that it should leave alone."""

from __future__ import annotations

from typing import ClassVar

from safemax_sd.evaluation.metrics.base import Batch, PerItemMetric
from torch import Tensor


class Drift(PerItemMetric):
    """Mean squared difference from the base model's latents for the same start noise; latents have variance about 1."""

    name: ClassVar[str] = "drift"
    label: ClassVar[str] = "Drift"
    note: ClassVar[str] = "mean squared difference from the base’s latents"
    order: ClassVar[int] = 50
    higher_is_better: ClassVar[bool | None] = False
    subsets: ClassVar[tuple[str, ...]] = ("retain", "neighbours")

    def applies(self, batch: Batch) -> bool:
        return batch.latents is not None and batch.reference is not None

    def per_item(self, batch: Batch) -> Tensor:
        assert batch.latents is not None and batch.reference is not None
        return (batch.latents - batch.reference).square().flatten(1).mean(1)
