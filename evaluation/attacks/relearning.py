"""Relearning: the target is fine-tuned on pictures of the concept with their prompts.

Source: github.com/sail-sg/Meta-Unlearning (AdamW at 1e-4, 1e-5 and 1e-6, all weights or a LoRA of rank 4, up to 500
steps on pictures that the base model draws); github.com/gmum/MemoRa trains its LoRA in the same way, after 10 to 500
steps. Deviations: higher rates are added, which a small model needs; the rate is constant, so that one training serves
all its numbers of steps (MemoRa's falls along a cosine); batches are of 8, without flips; pictures are real ones where
there are any; the pictures of several concepts are trained on together. MemoRa's inverted and interpolated pictures are
not reproduced.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.fine_tuning import STEPS_LABEL, STEPS_NOTE, FineTuningSettings, tuned_tries
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task


class Relearning(Attack):
    """A fine-tuning on pictures of the concept; the numbers of steps show how near the knowledge still is."""

    name: ClassVar[str] = "relearning"
    version: ClassVar[int] = 2
    label: ClassVar[str] = "Relearning"
    access: ClassVar[Access] = "weights"
    paper: ClassVar[str] = "github.com/sail-sg/Meta-Unlearning"
    note: ClassVar[str] = "fine-tuned on pictures of the concept"
    figures_note: ClassVar[str] = STEPS_NOTE
    x_label: ClassVar[str] = STEPS_LABEL
    x_is_cost: ClassVar[bool] = True
    Settings: ClassVar[type[Any]] = FineTuningSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": FineTuningSettings(full_rates=(1e-3,), lora_rates=(1e-2,), steps=(20, 50, 200)),
        "full": FineTuningSettings(),
    }
    settings: FineTuningSettings

    def calls(self, task: Task, sampling: Sampling) -> int:
        return self.settings.calls(task, sampling)

    def run(self, target: Target, task: Task) -> Generator[Try]:
        return tuned_tries(target, task, task.examples, self.settings, purpose=self.name)
