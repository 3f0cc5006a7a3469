"""What an erasure trains and stores: a LoRA, or every weight of the denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safemax_sd.adapters import lora
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import SHARE, Range, RunOptions, option
from safemax_sd.families import ModelFamily
from safemax_sd.families.base import LoraTargets

FULL_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class WeightsOptions(RunOptions):
    """Flags of what is trained and how it is stored."""

    group: ClassVar[str] = "LoRA"

    trainable: Literal["lora", "full"] = option("lora", "Train a LoRA, or every weight of the denoiser.")
    lora_targets: LoraTargets = option("all", "Which layers get a LoRA.")
    rank: int = option(
        16, "LoRA rank (alpha equals it).", Range("must be in 1 to 4,096", lambda value: 1 <= value <= 4096)
    )
    lora_dropout: float = option(0.0, "LoRA dropout.", SHARE)
    output_kohya_format: bool = option(False, "Also write the adapter for A1111 and ComfyUI.")


class Trainable(ABC):
    """The trained weights of a family's denoiser.

    Attributes:
        parameters: To step, float32, in a fixed order.
    """

    parameters: list[nn.Parameter]

    def restrict(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train only these of them: the others get no gradients, moments or part in clipping, but are saved too."""
        trained = {id(parameter) for parameter in parameters}
        for parameter in self.parameters:
            parameter.requires_grad_(id(parameter) in trained)
        self.parameters = [parameter for parameter in self.parameters if parameter.requires_grad]

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write them into a folder that takes its place, or gives its files theirs, when all of it is written."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Copy saved values into the attached weights, in place, bit for bit.

        Raises:
            SafemaxError: They are missing or belong to another model or other settings.
        """


class Lora(Trainable):
    """A LoRA next to frozen base weights."""

    def __init__(self, family: ModelFamily, config: WeightsOptions, rank_pattern: dict[str, int] | None = None) -> None:
        if config.output_kohya_format and not family.kohya_format:
            raise OptionError("--output_kohya_format", True, f"A1111 and ComfyUI know no {family.name} models")
        self.family, self.kohya = family, config.output_kohya_format
        self.parameters = lora.attach(
            family,
            rank=config.rank,
            targets=config.lora_targets,
            dropout=config.lora_dropout,
            seed=config.seed,
            rank_pattern=rank_pattern,
        )
        family.denoiser.eval()
        for module in family.denoiser.modules():
            if isinstance(module, BaseTunerLayer):  # the base model's own dropout stays off
                module.lora_dropout.train()  # type: ignore[union-attr]

    def save(self, directory: Path) -> None:
        lora.save_adapter(self.family, directory, kohya=self.kohya)

    def load(self, directory: Path) -> None:
        lora.load_adapter(self.family, directory)


class FullModel(Trainable):
    """Every weight of the denoiser; stored as the denoiser's folder in diffusers' format."""

    def __init__(self, family: ModelFamily) -> None:
        self.family = family
        family.denoiser.float()  # half-precision weights barely move under AdamW
        self.parameters = list(family.denoiser.requires_grad_(True).parameters())

    def save(self, directory: Path) -> None:
        self.family.denoiser.save_pretrained(directory / self.family.denoiser_part)  # type: ignore[operator]

    def load(self, directory: Path) -> None:
        path = directory / self.family.denoiser_part / FULL_WEIGHTS
        if not path.exists():
            raise SafemaxError(f"{directory} holds no {self.family.denoiser_part}/{FULL_WEIGHTS}")
        stored = lora.read_weights(path)
        own: dict[str, Tensor] = self.family.denoiser.state_dict()
        lora.check_fit(path, stored, own, "this base model")
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def attach(family: ModelFamily, config: WeightsOptions, rank_pattern: dict[str, int] | None = None) -> Trainable:
    """Make the weights that `--trainable` names trainable; `rank_pattern`: layers whose LoRA is of another rank."""
    return FullModel(family) if config.trainable == "full" else Lora(family, config, rank_pattern)
