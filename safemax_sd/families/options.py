"""Flags that select the base model and the way it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from safemax_sd.core.options import Options, Quantization, Range, option
from safemax_sd.families.base import LoadOptions

CPU = torch.device("cpu")


@dataclass
class LoadingOptions(Options):
    """Flags of the base model; families are loaded from `LoadOptions`, which are made of these."""

    group: ClassVar[str] = "Base model"

    pretrained_model_name_or_path: str = option(
        "emoji", "Diffusers folder, single .safetensors file, hub id or embedded model (emoji).", path=True
    )
    single_file_config: str | None = option(
        None,
        "Diffusers folder or hub id with a single file's configuration and the networks that it lacks.",
        path=True,
    )
    revision: str | None = option(None, "Revision on the hub.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    cache_dir: str | None = option(None, "Folder of hub downloads.", path=True)
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(None, "Override of the scheduler's setting.")

    def load_options(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> LoadOptions:
        """Return the options of `load_family`.

        Args:
            device: Device of all networks.
            dtype: Type of the frozen weights.
        """
        return LoadOptions(
            self.pretrained_model_name_or_path,
            revision=self.revision,
            variant=self.variant,
            cache_dir=self.cache_dir,
            dtype=dtype,
            device=device,
            prediction_type=self.prediction_type,
            single_file_config=self.single_file_config,
        )


@dataclass
class BaseModelOptions(LoadingOptions):
    """Flags of the base model and of its pictures."""

    resolution: int | None = option(
        None,
        "Side of pictures in pixels; the model's own if not given.",
        Range("must be a multiple of 8, 16,384 at most", lambda value: 0 < value <= 16_384 and value % 8 == 0),
    )
    quantize: Quantization | None = option(
        None, "Quantization of the frozen denoiser: int8 (torchao), or nf4 (bitsandbytes, CUDA only)."
    )

    def load_options(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> LoadOptions:
        return replace(super().load_options(device, dtype), quantize=self.quantize)
