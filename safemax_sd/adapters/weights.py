"""The weights that an erasure trains and stores: a LoRA, or every weight of the denoiser."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from safemax_sd.adapters import lora
from safemax_sd.adapters.lora import LoraSettings
from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.options import RANK, SHARE, RunOptions, option
from safemax_sd.families import ModelFamily
from safemax_sd.families.base import LoraTargets, tuner_layers

FULL_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class WeightsOptions(RunOptions):
    """Flags of the trained weights and their files."""

    group: ClassVar[str] = "LoRA"

    trainable: Literal["lora", "full"] = option("lora", "Trained weights: a LoRA, or all of the denoiser's.")
    lora_targets: LoraTargets = option("all", "Layers that get a LoRA.")
    rank: int = option(16, "LoRA rank (alpha equals it).", RANK)
    lora_dropout: float = option(0.0, "LoRA dropout.", SHARE)
    output_kohya_format: bool = option(False, "Write the adapter for A1111, Forge and ComfyUI as well.")

    def lora(self) -> LoraSettings | None:
        """Return the layout of the LoRA to train; None where every weight is to train."""
        if self.trainable == "full":
            return None
        return LoraSettings(self.rank, self.lora_targets, self.lora_dropout)


class TrainedWeights(ABC):
    """The trained weights of a family's denoiser.

    Attributes:
        parameters: Parameters that the optimizer steps, float32, in a fixed order.
        layout: Layout of the LoRA that `save` writes; None if it writes the whole denoiser.
    """

    parameters: list[nn.Parameter]
    layout: LoraSettings | None

    def restrict(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train only these parameters.

        The others get no gradients and no moments, and do not count in gradient clipping, but they are saved too.
        """
        trained = {id(parameter) for parameter in parameters}
        for parameter in self.parameters:
            parameter.requires_grad_(id(parameter) in trained)
        self.parameters = [parameter for parameter in self.parameters if parameter.requires_grad]

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the result into a folder, which the caller moves into place once it is complete; training has ended."""

    def save_checkpoint(self, directory: Path) -> None:
        """Write what `load` reads into a folder."""
        self.save(directory)

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Copy the values of a checkpoint into the attached weights, in place, bit for bit.

        Raises:
            SafemaxError: The file is missing or belongs to another model or other settings.
        """


class LoraWeights(TrainedWeights):
    """A LoRA on frozen base weights.

    Args:
        family: Loaded, frozen model.
        settings: Layout of the LoRA.
        seed: Seed of its initial matrices.
        kohya: True to save it in kohya's format too.
        changes: Changes that the base weights have already, by layer; the saved LoRA makes them as well.
    """

    def __init__(
        self,
        family: ModelFamily,
        settings: LoraSettings,
        *,
        seed: int = 0,
        kohya: bool = False,
        changes: Mapping[str, LowRank] | None = None,
    ) -> None:
        self.family, self.kohya, self.changes = family, kohya, dict(changes or {})
        self.layout = replace(settings, rank_pattern=lora.rank_pattern(settings.rank, self.changes))
        self.parameters = lora.attach(family, settings, seed=seed)
        family.denoiser.eval()
        for layer in tuner_layers(family.denoiser):  # the base model's own dropout stays off
            layer.lora_dropout.train()

    def save(self, directory: Path) -> None:
        lora.save_adapter(self.family, directory, kohya=self.kohya, changes=self.changes)

    def save_checkpoint(self, directory: Path) -> None:
        lora.save_adapter(self.family, directory)

    def load(self, directory: Path) -> None:
        lora.load_adapter(self.family, directory)


class FullWeights(TrainedWeights):
    """Every weight of the denoiser; stored as the denoiser's folder in diffusers' format."""

    def __init__(self, family: ModelFamily) -> None:
        self.family, self.layout = family, None
        family.denoiser.float()  # half-precision weights barely move under AdamW
        self.parameters = list(family.denoiser.requires_grad_(True).parameters())

    def save(self, directory: Path) -> None:
        save_denoiser(self.family, directory)

    def load(self, directory: Path) -> None:
        path = directory / self.family.denoiser_part / FULL_WEIGHTS
        if not path.exists():
            raise SafemaxError(f"{directory} holds no {self.family.denoiser_part}/{FULL_WEIGHTS}")
        stored = lora.read_weights(path)
        own: dict[str, Tensor] = self.family.denoiser.state_dict()
        lora.check_fit(path, stored, own, "this base model")
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def save_denoiser(family: ModelFamily, directory: Path) -> None:
    """Write the denoiser's folder in diffusers' format, its weights in one file, whatever their size."""
    clear_path(family.denoiser)
    family.denoiser.save_pretrained(  # type: ignore[operator]
        directory / family.denoiser_part, max_shard_size=sys.maxsize
    )


def clear_path(part: Any) -> None:
    """Clear `_name_or_path`: diffusers would save the folder that the part of a pipeline was loaded from."""
    if part.config.get("_name_or_path"):
        part.register_to_config(_name_or_path="")


def attach(
    family: ModelFamily, options: WeightsOptions, *, changes: Mapping[str, LowRank] | None = None
) -> TrainedWeights:
    """Make the weights that `--trainable` names trainable.

    Args:
        family: Loaded, frozen model.
        options: Flags.
        changes: Changes that the layers of a LoRA have already, by name.
    """
    settings = options.lora()
    if settings is None:
        return FullWeights(family)
    return LoraWeights(family, settings, seed=options.seed, kohya=options.output_kohya_format, changes=changes)
