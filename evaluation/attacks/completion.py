"""Completion: the base model takes the first sampling steps, the target the others.

Source: github.com/kevinlu4588/WhenAreConceptsErased, where the base model takes 6 or 11 of 50 steps. The shares of the
steps are settings here, since models are sampled with other numbers of steps. 0.35 and 0.5 are added, and give more
help: with 0.5 the base model has taken half of the steps.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor


@dataclass(frozen=True)
class CompletionSettings:
    """Settings of completion.

    Attributes:
        shares: Fractions of the sampling steps that the base model takes; each is a try.
    """

    shares: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5)


class Completion(Attack):
    """Half-drawn pictures of the base model, which the target has to complete."""

    name: ClassVar[str] = "completion"
    label: ClassVar[str] = "Completion"
    access: ClassVar[Access] = "latent"
    paper: ClassVar[str] = "github.com/kevinlu4588/WhenAreConceptsErased"
    note: ClassVar[str] = "the base model takes the first steps"
    Settings: ClassVar[type[Any]] = CompletionSettings
    presets: ClassVar[Mapping[str, Any]] = {"quick": CompletionSettings((0.2, 0.5)), "full": CompletionSettings()}
    settings: CompletionSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        if target.role == "untaught":
            return "there is no model that knows the concept, to take the first steps"
        if target.sampling.num_inference_steps < 2:
            return "a single sampling step cannot be shared"
        return None

    def calls(self, task: Task, sampling: Sampling) -> int:
        return len(self.settings.shares) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        steps = target.sampling.num_inference_steps
        pictures: Tensor | None = None
        counts = [min(max(1, round(share * steps)), steps - 1) for share in self.settings.shares]
        for taken in dict.fromkeys(counts):
            if pictures is None or target.family is not target.base:  # the base model completes its own pictures
                pictures = self.completed(target, task, taken)
            yield Try(f"{taken} of {steps} steps", pictures)

    @staticmethod
    def completed(target: Target, task: Task, taken: int) -> Tensor:
        """Draw the task's pictures, [N, 3, H, W] in 0 to 1, of which the base model has taken the first steps."""
        known, base = target.base.encode_prompts(task.texts), target.base
        begun = [
            base.sample_until(
                known.select(rows),
                task.noise[rows].to(target.device),
                guidance_scale=target.guidance_scale,
                num_inference_steps=target.sampling.num_inference_steps,
                steps=taken,
            )[0]
            for rows in torch.arange(len(task)).split(target.sampling.batch_size)
        ]
        return target.pictures(target.draw(target.encode(task.texts), torch.cat(begun), skipped=taken))
