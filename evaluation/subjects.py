"""Subjects of an evaluation: a base model together with one erasure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from peft.utils import get_peft_model_state_dict
from safemax_sd.evaluation.sampling import Sampler, StockSampler, samplers_of

from safemax_sd.adapters.lora import WEIGHTS_NAME, check_fit, lora_layers, read_weights
from safemax_sd.adapters.weights import FULL_WEIGHTS
from safemax_sd.core.errors import OptionError, SafemaxError, reason_of
from safemax_sd.core.options import Quantization
from safemax_sd.core.provenance import file_sha256
from safemax_sd.core.quiet import quiet
from safemax_sd.families import ModelFamily, load_family
from safemax_sd.families.folders import LOAD_ERRORS
from safemax_sd.families.latent import LatentFamily
from safemax_sd.results.erasure import ErasureRecord

ADAPTER_NAME = "safemax_erasure"


@dataclass(frozen=True)
class Models:
    """The loaded models of a subject.

    Attributes:
        pipeline: Pipeline of diffusers for the base model.
        scheduler_settings: Settings of the noise process, for `as_scheduler`.
        base: Sampler of the base model.
        erased: Sampler of the erased model.
        fingerprint: Digest that identifies the erasure in the cache of pictures.
    """

    pipeline: Any
    scheduler_settings: dict[str, Any]
    base: Sampler
    erased: Sampler
    fingerprint: str

    @property
    def samplers(self) -> dict[str, Any]:
        """Samplers of the model by name, the default first."""
        return samplers_of(self.pipeline.components)


class Subject(ABC):
    """An erasure to evaluate; only its record is read before `load`.

    Attributes:
        record: Record of the erasure.
        folder: Output folder of the run; None if there is none.
        quantize: Quantization of the denoiser that draws; None for none, however it was trained.
    """

    record: ErasureRecord
    folder: Path | None
    quantize: Quantization | None = None

    @abstractmethod
    def load(self, device: torch.device) -> Models:
        """Load the base and the erased model onto a device.

        Raises:
            OptionError: A model cannot be loaded, or no pipeline can sample from it.
        """


def dtype_on(device: torch.device, family: type[ModelFamily]) -> torch.dtype:
    """Return the type in which a family's pictures are drawn on a device: on a GPU, half precision."""
    return family.half_precision if device.type == "cuda" else torch.float32


class Adapter(Subject):
    """A LoRA or full weights in the output folder of a training or an edit.

    Raises:
        OptionError: The folder is not that of a finished run, or holds full weights, which are not quantized.
    """

    folder: Path

    def __init__(self, folder: Path, quantize: Quantization | None = None) -> None:
        self.record, self.folder, self.quantize = ErasureRecord.read(folder), folder, quantize
        if quantize is not None and self.record.lora is None:
            raise OptionError("--quantize", quantize, f"goes with a LoRA, and {folder} holds all weights: leave it out")

    def load(self, device: torch.device) -> Models:
        if not issubclass(self.record.family, LatentFamily):
            text = f"is a {self.record.family.name} model, which no pipeline draws from; see docs/class_unlearning.md"
            raise OptionError("--adapter", self.folder, text)
        options = self.record.base_model.options(device, dtype_on(device, self.record.family))
        family = load_family(replace(options, quantize=self.quantize))
        assert isinstance(family, LatentFamily)
        try:
            with quiet():
                if self.record.lora is None:
                    return _with_full_weights(family, self.folder)
                return _with_lora(family, self.folder, lora_layers(family, self.record.lora))
        except LOAD_ERRORS as error:
            text = f"cannot be loaded onto {family.options.name_or_path}: {reason_of(error)}"
            raise OptionError("--adapter", self.folder, text) from error


def _with_lora(family: LatentFamily, folder: Path, layers: Set[str]) -> Models:
    """Load a LoRA that must have all of these layers.

    Raises:
        SafemaxError: The file is damaged, or its layers are different ones.
    """
    pipeline = family.pipeline
    put_lora(family, folder, layers, ADAPTER_NAME)
    return Models(
        pipeline,
        family.scheduler_settings,
        StockSampler(pipeline, switch=pipeline.disable_lora),
        StockSampler(pipeline, switch=pipeline.enable_lora),
        file_sha256(folder / WEIGHTS_NAME),
    )


def put_lora(family: LatentFamily, folder: Path, layers: Set[str], name: str) -> None:
    """Load a LoRA into a family's pipeline.

    Args:
        family: Base model.
        folder: Output folder of a run.
        layers: Layers that the LoRA must have.
        name: Name of the adapter in the pipeline.

    Raises:
        SafemaxError: The file is damaged, or its layers are different ones.
    """
    path = folder / WEIGHTS_NAME
    stored = read_weights(path)
    missing = sorted(layers - {name.partition(".lora_")[0].removeprefix(f"{family.denoiser_part}.") for name in stored})
    if missing:
        raise SafemaxError(f"{path} lacks {len(missing)} of {len(layers)} layers, the first of them {missing[0]}")
    family.pipeline.load_lora_weights(folder, weight_name=WEIGHTS_NAME, adapter_name=name)
    landed = get_peft_model_state_dict(family.denoiser, adapter_name=name)
    # diffusers only warns of tensors that fit no layer and of layers that lack one of their two matrices.
    check_fit(path, stored, {f"{family.denoiser_part}.{name}": tensor for name, tensor in landed.items()}, "the model")


def _with_full_weights(family: LatentFamily, folder: Path) -> Models:
    pipeline, part = family.pipeline, family.denoiser_part
    base, erased = getattr(pipeline, part), erased_denoiser(family, folder)
    return Models(
        pipeline,
        family.scheduler_settings,
        StockSampler(pipeline, switch=lambda: setattr(pipeline, part, base)),
        StockSampler(pipeline, switch=lambda: setattr(pipeline, part, erased)),
        file_sha256(folder / part / FULL_WEIGHTS),
    )


def erased_denoiser(family: LatentFamily, folder: Path) -> Any:
    """Load the denoiser of a run that stored all weights.

    Raises:
        SafemaxError: The file is damaged, or its tensors do not fit the base model.
    """
    part = family.denoiser_part
    base = getattr(family.pipeline, part)
    path = folder / part / FULL_WEIGHTS
    check_fit(path, read_weights(path), base.state_dict(), "the base model")
    return AutoModel.from_pretrained(str(folder), subfolder=part, torch_dtype=base.dtype).to(base.device)
