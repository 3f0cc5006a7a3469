"""Loading of a finished erasure: its base model with the stored weights in place."""

from __future__ import annotations

from pathlib import Path

import torch

from safemax_sd.adapters.weights import FullWeights, LoraWeights
from safemax_sd.families import ModelFamily, load_family
from safemax_sd.results.erasure import ErasureRecord


def load_result(folder: str | Path, device: str | torch.device = "cpu", *, weights: Path | None = None) -> ModelFamily:
    """Load the base model of a run, with its LoRA attached or its full weights in place of the base model's.

    Args:
        folder: Output folder of a finished run.
        device: Device to load onto.
        weights: Checkpoint of the same run to load instead of its final weights.

    Returns:
        Model in evaluation mode, with frozen weights.

    Raises:
        OptionError: The folder is not a finished run's, or its base model cannot be loaded.
        SafemaxError: The weights cannot be read or do not fit the base model.
    """
    record = ErasureRecord.read(Path(folder))
    family = load_family(record.base_model.options(device))
    stored = FullWeights(family) if record.lora is None else LoraWeights(family, record.lora)
    stored.load(weights or Path(folder))
    family.denoiser.requires_grad_(False).eval()
    return family
