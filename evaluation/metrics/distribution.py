"""FID and KID of retained pictures against real ones, computed by torch-fidelity."""

from __future__ import annotations

import math
import pickle
from typing import ClassVar

import torch
from safemax_sd.evaluation.metrics.base import WARNING, Batch, Context, Metric, Result
from safemax_sd.evaluation.metrics.description import Role
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.judge import load_judge

JUDGE_EXTRACTOR = "safemax-emoji"
"""The embedded judge's image features."""
INCEPTION = "inception-v3-compat"
"""Features of published values, torch-fidelity's own; it downloads their weights once."""
LAYER, INCEPTION_LAYER = "image", "2048"
FEWEST = 2
"""Pictures that a covariance needs."""
UNBIASED_FROM = 2048
"""Pictures below which the covariance of Inception's features is singular, and FID far too large."""
INCEPTION_NOTE = f"by Inception from fewer than {UNBIASED_FROM:,} pictures too large, to be compared within the table"
KID_SUBSETS = 50


class _JudgeFeatures(FeatureExtractorBase):  # type: ignore[misc]
    """The judge's image tower behind torch-fidelity's interface."""

    def __init__(self, name: str, features_list: list[str], **options: object) -> None:
        super().__init__(name, features_list)
        self.judge = load_judge("emoji")

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, pictures: Tensor) -> tuple[Tensor]:
        return (self.judge.encode_images(pictures.float() / 255),)


register_feature_extractor(JUDGE_EXTRACTOR, _JudgeFeatures)


def check_distribution(extractor: str, num_images: int) -> None:
    """See whether FID and KID can be measured, before anything is drawn.

    Args:
        extractor: Whose features they are of.
        num_images: Pictures that will be drawn.

    Raises:
        OptionError: Too few pictures.
        SafemaxError: Inception's weights can neither be found nor downloaded.
    """
    if num_images < FEWEST:
        raise OptionError("--num_images", num_images, f"must be at least {FEWEST} for FID and KID to real pictures")
    if extractor == INCEPTION:
        try:
            create_feature_extractor(INCEPTION, [INCEPTION_LAYER], cuda=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason, folder = " ".join(str(error).split())[:150], f"{torch.hub.get_dir()}/checkpoints"
            text = f"cannot be loaded ({reason}): download {URL_INCEPTION_V3} into {folder}"
            raise SafemaxError(f"Inception's weights, which FID and KID to real pictures need, {text}") from error


class _Pictures(Dataset[Tensor]):
    """uint8 pictures for torch-fidelity, from pictures in 0 to 1."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures.mul(255).round().byte()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


class _DistributionMetric(Metric):
    higher_is_better: ClassVar[bool | None] = False
    subsets: ClassVar[tuple[str, ...]] = ("retain",)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.parts: list[Tensor] = []

    def applies(self, batch: Batch) -> bool:
        return self.context.real is not None

    def update(self, batch: Batch) -> None:
        self.parts.append(batch.pictures)

    def _measure(self, **wanted: object) -> dict[str, float]:
        assert self.context.real is not None
        found: dict[str, float] = calculate_metrics(
            input1=_Pictures(torch.cat(self.parts)),
            input2=_Pictures(self.context.real),
            feature_extractor=self.context.extractor,
            cuda=torch.cuda.is_available(),
            cache=False,
            verbose=False,
            save_cpu_ram=True,  # no worker processes: the pictures are in memory
            **wanted,
        )
        return found

    @property
    def n(self) -> int:
        return sum(len(part) for part in self.parts)


class Fid(_DistributionMetric):
    """Fréchet distance of features (arXiv 1706.08500, eq. 6)."""

    name: ClassVar[str] = "fid"
    label: ClassVar[str] = "FID"
    note: ClassVar[str] = "distance to the real pictures"
    order: ClassVar[int] = 20
    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)
    comparison: ClassVar[tuple[Role, ...]] = (Role("retain", "fid", "FID", INCEPTION_NOTE),)

    def compute(self) -> Result:
        value = float(self._measure(fid=True)["frechet_inception_distance"])
        return Result(value, None, self.n, self._bias())

    def _bias(self) -> dict[str, str]:
        assert self.context.real is not None
        if self.context.extractor != INCEPTION or min(self.n, len(self.context.real)) >= UNBIASED_FROM:
            return {}
        return {WARNING: f"too large: fewer than {UNBIASED_FROM:,} pictures"}


class Kid(_DistributionMetric):
    """Kernel distance of features (arXiv 1801.01401), over random subsets."""

    name: ClassVar[str] = "kid"
    label: ClassVar[str] = "KID"
    order: ClassVar[int] = 30

    def compute(self) -> Result:
        assert self.context.real is not None
        size = min(1000, self.n, len(self.context.real))
        found = self._measure(kid=True, kid_subsets=KID_SUBSETS, kid_subset_size=size)
        mean, error = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
        if size == self.n == len(self.context.real):  # each subset is all there is, and says nothing of chance
            return Result(mean, None, self.n)
        half = 1.96 * error / math.sqrt(KID_SUBSETS)
        return Result(mean, (mean - half, mean + half), self.n)
