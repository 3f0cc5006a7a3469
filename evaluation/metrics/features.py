"""Features of pictures for FID and KID: the embedded judge's, or Inception's by torch-fidelity."""

from __future__ import annotations

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


class _Pictures(Dataset[Tensor]):
    """A dataset of uint8 pictures for torch-fidelity."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


def features_of(pictures: Tensor, extractor: str, judge: Judge) -> Tensor:
    """Extract features of pictures, which are first rounded to the 256 levels of picture files.

    Args:
        pictures: Generated or real pictures, float32 [N, 3, H, W] in 0 to 1.
        extractor: `JUDGE_EXTRACTOR` or `INCEPTION`.
        judge: Embedded judge, which `JUDGE_EXTRACTOR` uses.

    Returns:
        Features, float32 [N, D].
    """
    levels = pictures.mul(255).round().byte()
    if extractor == JUDGE_EXTRACTOR:
        return judge.encode_images(levels.float() / 255)
    cuda = torch.cuda.is_available()
    network = create_feature_extractor(extractor, [INCEPTION_LAYER], cuda=cuda)
    # No worker processes (save_cpu_ram): the pictures are in memory.
    found = get_featuresdict_from_dataset(_Pictures(levels), network, INCEPTION_BATCH, cuda, True, False)
    features: Tensor = found[INCEPTION_LAYER]
    return features
