"""Completion: the base model takes the first sampling steps, the target the others.

Source: github.com/kevinlu4588/WhenAreConceptsErased, where the base model takes 5 or 10 of 50 steps. The shares of the
steps are settings here, since models are sampled with other numbers of steps; the middle of the range is added.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task


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
        return None

    def calls(self, task: Task, sampling: Sampling) -> int:
        return len(self.settings.shares) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        known, asked = target.base.encode_prompts(task.texts), target.encode(task.texts)
        steps = target.sampling.num_inference_steps
        for share in self.settings.shares:
            taken = min(max(1, round(share * steps)), steps - 1)
            begun = [
                target.base.sample_until(
                    known.select(rows),
                    task.noise[rows].to(target.device),
                    guidance_scale=target.sampling.guidance_scale,
                    num_inference_steps=steps,
                    steps=taken,
                )[0]
                for rows in torch.arange(len(task)).split(target.sampling.batch_size)
            ]
            latents = target.draw(asked, torch.cat(begun), skipped=taken)
            yield Try(f"{taken} of {steps} steps", target.pictures(latents))
