"""Adapter scale: the erasure at another strength, as users of a LoRA set it, or merged half-way with the base model."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safemax_sd.evaluation.attacks.base import Access, Attack, Point, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor


@dataclass(frozen=True)
class AdapterScaleSettings:
    """Settings of adapter scale.

    Attributes:
        strengths: Factors of the erasure's change of the weights; each is a try. At 0 the model is the base model.
    """

    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25, 1.5)


class AdapterScale(Attack):
    """The erasure's change of the weights, scaled; 0.5 is a merge half-way with the base model."""

    name: ClassVar[str] = "adapter_scale"
    label: ClassVar[str] = "Adapter scale"
    access: ClassVar[Access] = "weights"
    note: ClassVar[str] = "the adapter at another strength"
    x_label: ClassVar[str] = "strength of the erasure"
    Settings: ClassVar[type[Any]] = AdapterScaleSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": AdapterScaleSettings((0.5, 1.5)),
        "full": AdapterScaleSettings(),
    }
    settings: AdapterScaleSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        if target.role == "never_known":
            return "a model trained anew has no adapter"
        if target.role == "untaught":
            return "the base model has no adapter"
        return None

    def calls(self, task: Task, sampling: Sampling) -> int:
        return len(self.settings.strengths) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        asked = target.encode(task.texts)
        pictures: Tensor | None = None
        for strength in self.settings.strengths:
            if pictures is None or target.family is not target.base:  # the base model is the same at any strength
                with target.at_strength(strength):
                    pictures = target.pictures(target.draw(asked, task.noise))
            yield Try(f"strength {strength:g}", pictures, point=Point(self.label, strength))
