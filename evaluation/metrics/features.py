"""Features of pictures for FID and KID: the embedded judge's, or Inception's by torch-fidelity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from safemax_sd.core.judge import Judge

JUDGE_EXTRACTOR = "safemax-emoji"
"""The embedded judge's image features."""
INCEPTION = "inception-v3-compat"
"""Features of published values, torch-fidelity's own; it downloads their weights once."""
INCEPTION_LAYER, INCEPTION_BATCH = "2048", 64


class _Pictures(Dataset[Tensor]):
    """uint8 pictures for torch-fidelity."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


def features_of(pictures: Tensor, extractor: str, judge: Judge) -> Tensor:
    """Take features, float32 [N, D], of pictures [N, 3, H, W] in 0 to 1, in the 256 levels that a file holds.

    Args:
        pictures: Generated or real ones.
        extractor: `JUDGE_EXTRACTOR` or `INCEPTION`.
        judge: The embedded one, for `JUDGE_EXTRACTOR`.
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
