"""Benign fine-tuning: the target is fine-tuned on pictures of other concepts, and may remember the erased one.

Source: arXiv 2410.08074, which fine-tunes erased Stable Diffusion models on unrelated pictures. Deviations: the base
model draws the pictures, from the suite's retain prompts, instead of a public set; rates and numbers of steps are those
of `relearning`, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.fine_tuning import STEPS_LABEL, STEPS_NOTE, FineTuningSettings, tuned_tries
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task


class BenignTuning(Attack):
    """A fine-tuning on pictures of other concepts, as any user of the model may run it."""

    name: ClassVar[str] = "benign_tuning"
    label: ClassVar[str] = "Benign fine-tuning"
    access: ClassVar[Access] = "weights"
    paper: ClassVar[str] = "arXiv 2410.08074"
    note: ClassVar[str] = "fine-tuned on pictures of other concepts"
    needs_kept: ClassVar[bool] = True
    figures_note: ClassVar[str] = STEPS_NOTE
    x_label: ClassVar[str] = STEPS_LABEL
    x_is_cost: ClassVar[bool] = True
    Settings: ClassVar[type[Any]] = FineTuningSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": FineTuningSettings(full_rates=(3e-4,), lora_rates=(), steps=(200,)),
        "full": FineTuningSettings(),
    }
    settings: FineTuningSettings

    def calls(self, task: Task, sampling: Sampling) -> int:
        return self.settings.calls(task, sampling)

    def run(self, target: Target, task: Task) -> Generator[Try]:
        if task.kept is None:
            raise ValueError("the task has no pictures of other concepts")
        return tuned_tries(target, task, task.kept, self.settings, purpose=self.name)
