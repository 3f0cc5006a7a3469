"""What is evaluated: a base model and one way of making it forget."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DiffusionPipeline
from safemax_sd.evaluation.sampling import FLOW_SAMPLERS, SAMPLERS, Sampler, StockSampler, without_warnings

from safemax_sd.adapter import WEIGHTS_NAME
from safemax_sd.assets import resolve_model
from safemax_sd.erased import read_record
from safemax_sd.errors import OptionError
from safemax_sd.families.base import FAMILIES
from safemax_sd.families.latent import LatentFamily
from safemax_sd.trainable import FULL_WEIGHTS

ADAPTER_NAME = "safemax_erasure"


@dataclass(frozen=True)
class Models:
    """A subject in memory.

    Attributes:
        pipeline: The base model's, of diffusers.
        base: Draws with the base model.
        erased: Draws with what is evaluated.
        fingerprint: Of `erased`, so that its pictures can be kept.
    """

    pipeline: Any
    base: Sampler
    erased: Sampler
    fingerprint: str

    @property
    def samplers(self) -> dict[str, Any]:
        """The model's samplers by name, the usual one first."""
        return FLOW_SAMPLERS if "transformer" in self.pipeline.components else SAMPLERS


class Subject(ABC):
    """What is evaluated; nothing but its record is read before `load`.

    Attributes:
        record: Content of an `erasure.json`.
        folder: The output folder of a run, or None where there is none.
    """

    record: dict[str, Any]
    folder: Path | None

    @abstractmethod
    def load(self, device: torch.device) -> Models:
        """Load onto a device.

        Raises:
            OptionError: It cannot be loaded, or no pipeline draws from such a model.
        """


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


class Adapter(Subject):
    """The output folder of a training; nothing else of the training is read.

    Raises:
        OptionError: The folder is not a finished training's.
    """

    def __init__(self, folder: Path) -> None:
        self.record, self.folder = read_record(folder), folder

    def load(self, device: torch.device) -> Models:
        assert self.folder is not None
        base = self.record["base_model"]
        family = FAMILIES.get(base["family"])
        if not issubclass(family, LatentFamily):
            text = f"is a {base['family']} model, which no pipeline draws from; see docs/class_unlearning.md"
            raise OptionError("--adapter", self.folder, text)
        load_weights = _with_full_weights if self.record["config"]["trainable"] == "full" else _with_lora
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                resolve_model(base["name_or_path"]),
                revision=base["revision"],
                variant=base["variant"],
                dtype=dtype_on(device),
                **family.pipeline_arguments,
            ).to(device)
            pipeline.set_progress_bar_config(disable=True)
            return load_weights(pipeline, self.folder, family.denoiser_part)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            text = f"cannot be loaded onto {base['name_or_path']}: {reason}"
            raise OptionError("--adapter", self.folder, text) from error


def _with_lora(pipeline: Any, folder: Path, part: str) -> Models:
    """`part` is what the pipeline calls its denoiser, here and below."""
    with without_warnings():  # of text encoders that the file has nothing for, as is meant
        pipeline.load_lora_weights(folder, weight_name=WEIGHTS_NAME, adapter_name=ADAPTER_NAME)
    return Models(
        pipeline,
        StockSampler(pipeline, switch=pipeline.disable_lora),
        StockSampler(pipeline, switch=pipeline.enable_lora),
        _sha256(folder / WEIGHTS_NAME),
    )


def _with_full_weights(pipeline: Any, folder: Path, part: str) -> Models:
    base = getattr(pipeline, part)
    erased = AutoModel.from_pretrained(str(folder), subfolder=part, torch_dtype=base.dtype).to(base.device)
    return Models(
        pipeline,
        StockSampler(pipeline, switch=lambda: setattr(pipeline, part, base)),
        StockSampler(pipeline, switch=lambda: setattr(pipeline, part, erased)),
        _sha256(folder / part / FULL_WEIGHTS),
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
