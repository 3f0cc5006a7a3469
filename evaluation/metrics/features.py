"""Features of pictures for FID and KID: the embedded judge's, or Inception's by torch-fidelity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from safemax_sd.core.judge import Judge

JUDGE_EXTRACTOR = "safemax-emoji"
"""Name of the embedded judge's image features."""
INCEPTION = "inception-v3-compat"
"""Name of torch-fidelity's Inception features, as in published values; it downloads their weights once."""
INCEPTION_LAYER, INCEPTION_BATCH = "2048", 64
INCEPTION_SIZE = int(INCEPTION_LAYER)
"""Number of Inception's features of a picture."""


class _Pictures(Dataset[Tensor]):
    """A dataset of uint8 pictures for torch-fidelity."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


def feature_extractor(name: str, judge: Judge) -> Callable[[Tensor], Tensor]:
    """Load a feature extractor: a function from pictures, float [N, 3, H, W] in 0 to 1, to float32 [N, D].

    Pictures are first rounded to the 256 levels of picture files.

    Args:
        name: `JUDGE_EXTRACTOR` or `INCEPTION`.
        judge: Embedded judge, which `JUDGE_EXTRACTOR` uses.
    """
    if name == JUDGE_EXTRACTOR:
        return lambda pictures: judge.encode_images(_levels(pictures).float() / 255)
    cuda = torch.cuda.is_available()
    network = create_feature_extractor(name, [INCEPTION_LAYER], cuda=cuda)

    def extract(pictures: Tensor) -> Tensor:
        # No worker processes (save_cpu_ram): the pictures are in memory.
        found = get_featuresdict_from_dataset(_Pictures(_levels(pictures)), network, INCEPTION_BATCH, cuda, True, False)
        features: Tensor = found[INCEPTION_LAYER]
        return features

    return extract


def _levels(pictures: Tensor) -> Tensor:
    return pictures.mul(255).round().byte()
