"""Second LoRA: a LoRA that the base model was trained with for the concept is put on top of the erased model.

This project's own: users combine an erased model with concept LoRAs that were made for its base model, and never train
on the erased one. The training is that of `relearning`'s LoRA, on the base model; the strength is 1.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safemax_sd.evaluation.attacks.base import Access, Attack, Point, Try
from safemax_sd.evaluation.attacks.fine_tuning import STEPS_LABEL, STEPS_NOTE, denoising_steps, lora, reached, try_name
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from torch import nn

from safemax_sd.adapters.lora import adapter_state
from safemax_sd.adapters.low_rank import LowRank, fuse


@dataclass(frozen=True)
class SecondLoraSettings:
    """Settings of the second LoRA.

    Attributes:
        learning_rates: Learning rates of its training.
        steps: Numbers of optimizer steps after which it is tried; each with each rate is a try.
        batch_size: Samples of a step.
        rank: Rank.
    """

    learning_rates: tuple[float, ...] = (1e-3, 3e-4, 1e-4)
    steps: tuple[int, ...] = (10, 20, 50, 100, 200, 500)
    batch_size: int = 8
    rank: int = 4


class SecondLora(Attack):
    """A concept's LoRA for the base model, merged into the target at strength 1."""

    name: ClassVar[str] = "second_lora"
    version: ClassVar[int] = 2
    label: ClassVar[str] = "Second LoRA"
    access: ClassVar[Access] = "weights"
    note: ClassVar[str] = "a LoRA of the concept, trained on the base model"
    figures_note: ClassVar[str] = STEPS_NOTE
    x_label: ClassVar[str] = STEPS_LABEL
    x_is_cost: ClassVar[bool] = True
    Settings: ClassVar[type[Any]] = SecondLoraSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": SecondLoraSettings(learning_rates=(1e-3,), steps=(20, 200)),
        "full": SecondLoraSettings(),
    }
    settings: SecondLoraSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        if shapes(target.family.denoiser) != shapes(target.base.denoiser):
            return "its weights are of other sizes than the base model's"
        return None

    def calls(self, task: Task, sampling: Sampling) -> int:
        settings = self.settings
        each = max(settings.steps) * settings.batch_size + len(settings.steps) * sampling.calls(len(task))
        return len(settings.learning_rates) * each

    def run(self, target: Target, task: Task) -> Generator[Try]:
        asked = target.encode(task.texts)
        trained = task.once(f"{self.name} {self.settings}", lambda: self.trained(target, task))
        for (rate, steps), changes in trained.items():
            with target.restored():
                fuse(target.family.denoiser, changes, target.family.options.name_or_path)
                pictures = target.pictures(target.draw(asked, task.noise))
                yield Try(try_name("LoRA", rate, steps), pictures, point=Point("LoRA", steps))

    def trained(self, target: Target, task: Task) -> dict[tuple[float, int], dict[str, LowRank]]:
        """Train LoRAs on the base model; returns the changes of its layers by learning rate and number of steps."""
        settings, found = self.settings, {}
        for rate in settings.learning_rates:
            generator = task.generator(self.name)
            with lora(target.base, settings.rank, generator) as parameters:
                training = denoising_steps(target.base, parameters, task.examples, rate, settings.batch_size, generator)
                for steps in reached(training, settings.steps):
                    found[rate, steps] = lora_changes(target.base.denoiser)
        return found


def lora_changes(denoiser: nn.Module) -> dict[str, LowRank]:
    """Return a copy of an attached LoRA as changes by layer."""
    state = {name: tensor.clone() for name, tensor in adapter_state(denoiser).items()}
    layers = dict.fromkeys(name.rsplit(".", 2)[0] for name in state)
    return {layer: LowRank(state[f"{layer}.lora_B.weight"], state[f"{layer}.lora_A.weight"]) for layer in layers}


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's weights by name."""
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
