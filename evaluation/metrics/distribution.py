"""FID and KID of retained pictures against real ones, computed by torch-fidelity."""

from __future__ import annotations

import math
import pickle
from typing import ClassVar

import torch
from safemax_sd.evaluation.metrics.base import WARNING, Batch, Context, Metric, Result
from safemax_sd.evaluation.metrics.description import Role
from safemax_sd.evaluation.metrics.features import INCEPTION, INCEPTION_LAYER, INCEPTION_SIZE
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from safemax_sd.core.errors import OptionError, SafemaxError, reason_of

FEWEST = 2
"""Number of pictures that a covariance needs."""
FID_NOTE = f"larger with fewer pictures; far too large with fewer than features ({INCEPTION_SIZE:,} by Inception)"
KID_SUBSETS = 50


def check_distribution(extractor: str, num_images: int) -> None:
    """Check that FID and KID can be measured, before anything is drawn.

    Args:
        extractor: Feature extractor; see `feature_extractor`.
        num_images: Number of pictures that will be drawn.

    Raises:
        OptionError: There are fewer than `FEWEST` pictures.
        SafemaxError: Inception's weights can neither be found nor downloaded.
    """
    if num_images < FEWEST:
        raise OptionError("--num_images", num_images, f"must be at least {FEWEST} for FID and KID to real pictures")
    if extractor == INCEPTION:
        try:
            create_feature_extractor(INCEPTION, [INCEPTION_LAYER], cuda=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason, folder = reason_of(error), f"{torch.hub.get_dir()}/checkpoints"
            text = f"cannot be loaded ({reason}): download {URL_INCEPTION_V3} into {folder}"
            raise SafemaxError(f"Inception's weights, which FID and KID to real pictures need, {text}") from error


class _DistributionMetric(Metric):
    higher_is_better: ClassVar[bool | None] = False
    subsets: ClassVar[tuple[str, ...]] = ("retain",)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.parts: list[Tensor] = []

    def applies(self, batch: Batch) -> bool:
        return self.context.real is not None

    def update(self, batch: Batch) -> None:
        self.parts.append(batch.extracted(self.context))

    @property
    def features(self) -> Tensor:
        """Features of the generated pictures, float32 [N, D]."""
        return torch.cat(self.parts)

    @property
    def n(self) -> int:
        return sum(len(part) for part in self.parts)


class Fid(_DistributionMetric):
    """Fréchet distance between the features of generated and real pictures (arXiv 1706.08500, eq. 6)."""

    name: ClassVar[str] = "fid"
    label: ClassVar[str] = "FID"
    note: ClassVar[str] = "distance to the real pictures"
    order: ClassVar[int] = 20
    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)
    comparison: ClassVar[tuple[Role, ...]] = (Role("retain", "fid", "FID", FID_NOTE),)

    def compute(self) -> Result:
        moments = [fid_features_to_statistics(features) for features in (self.features, self.context.real_features)]
        value = float(fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID])
        return Result(value, None, self.n, self._bias())

    def _bias(self) -> dict[str, str]:
        """Return a warning if there are fewer pictures than features, so that their covariance is singular."""
        assert self.context.real is not None
        size = self.parts[0].shape[1]
        if min(self.n, len(self.context.real)) >= size:
            return {}
        return {WARNING: f"too large: fewer than {size:,} pictures"}


class Kid(_DistributionMetric):
    """Kernel distance between the features of generated and real pictures, over random subsets (arXiv 1801.01401).

    It has no interval: the subsets share pictures, so that their spread is not that of the estimate.
    """

    name: ClassVar[str] = "kid"
    label: ClassVar[str] = "KID"
    order: ClassVar[int] = 30

    def compute(self) -> Result:
        real = self.context.real_features
        size = min(1000, self.n, len(real))
        found = kid_features_to_metric(
            self.features, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
        )
        return Result(found[KEY_METRIC_KID_MEAN], None, self.n)
