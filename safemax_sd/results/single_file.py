"""The merged model of an export as one file under the original code's names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from safemax_sd.core.errors import OptionError
from safemax_sd.families import ModelFamily
from safemax_sd.results.export_base import ExportBase

SINGLE_FILE = "model.safetensors"
V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
"""Names of empty tensors from which ComfyUI and Forge learn of a v-prediction model and of its schedule."""


def check_single_file(family: type[ModelFamily]) -> None:
    """Check that a family's models can be written as a single file.

    Raises:
        OptionError: The original code's names of such models are not known.
    """
    if not family.original_parts:
        raise OptionError("--single_file", True, f"is for Stable Diffusion 1.x, 2.x and XL, not {family.name} models")


def write_single_file(path: Path, base: ExportBase, denoiser: nn.Module) -> None:
    """Write a model as one safetensors file.

    Args:
        path: File to write.
        base: Base model, whose other parts are written.
        denoiser: Denoiser to write, of the base model's family.

    Raises:
        OptionError: The original code has no counterpart of a layer.
        SafemaxError: A part of the base model cannot be read.
    """
    source = base.source
    convert = source.record.family.original_parts[source.part]
    try:
        weights = base.other_weights() | convert(denoiser.state_dict(), {})
    except ValueError as error:
        raise OptionError("--single_file", True, f"cannot be written for {source.base}: {error}") from error
    for name in (V_PREDICTION, ZERO_TERMINAL_SNR):
        weights.pop(name, None)
    scheduler = base.scheduler_config()
    if (source.record.base_model.prediction_type or scheduler.get("prediction_type")) == "v_prediction":
        weights[V_PREDICTION] = torch.empty(0)
        if scheduler.get("rescale_betas_zero_snr"):
            weights[ZERO_TERMINAL_SNR] = torch.empty(0)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
