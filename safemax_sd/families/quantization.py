"""Quantization of the denoiser's frozen weights, through diffusers' own configurations.

Only linear layers are quantized, to int8 with one scale for each output channel (torchao) or to 4-bit normal floats
(bitsandbytes; QLoRA, arXiv 2305.14314); convolutions, norms and a LoRA keep their type.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import Quantization

OPTION = "--quantize"
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_device(kind: Quantization, device: torch.device) -> None:
    """Check that a device supports a quantization.

    Raises:
        OptionError: The device does not support it.
    """
    if kind == "nf4" and device.type != "cuda":
        raise OptionError(OPTION, kind, f"needs a CUDA device and this is a {device.type} device: use int8")


def quantization_config(kind: Quantization, device: torch.device, dtype: torch.dtype) -> Any:
    """Return diffusers' configuration of a quantization.

    Args:
        kind: Type of the stored weights.
        device: Device of the denoiser.
        dtype: Type that the weights are computed in.

    Raises:
        OptionError: The device does not support it, or its package is missing.
    """
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    check_device(kind, device)
    package = PACKAGES[kind]
    try:
        import_module(package)
    except ImportError as error:
        raise OptionError(OPTION, kind, f"needs the {package} package: pip install {package}") from error
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
