"""State inversion: all text states of a prompt are free, and optimised until the model draws the concept.

This project's own, and stronger than an inverted token (`concept_inversion`): nothing has to pass the text encoder.
Free are the token states and, where the denoiser reads one (SDXL, SD 3, FLUX), the pooled state. The loss is the
denoising loss on pictures of the concept, ‖target − f(x_t, t, states)‖², for one set of states a concept, which begin
as those of its first prompt; Adam, as textual inversion (arXiv 2208.01618) trains its token. The rate is constant for
two thirds of the steps and falls linearly to 0 in the last: without that the states end somewhere in their wandering,
and a model loses concepts that they began with. A low rate keeps what the first states draw; a high one reaches states
far from them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from transformers import get_wsd_schedule

from safemax_sd.families import TOKEN_STATES, Conditioning
from safemax_sd.families.latent import POOLED


@dataclass(frozen=True)
class StateInversionSettings:
    """Settings of state inversion.

    Attributes:
        learning_rates: Adam's learning rates; each is a try.
        steps: Optimizer steps.
        batch_size: Samples of a step.
    """

    learning_rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    steps: int = 300
    batch_size: int = 8


class StateInversion(Attack):
    """Text states that make the model denoise pictures of the concept."""

    name: ClassVar[str] = "state_inversion"
    version: ClassVar[int] = 2
    label: ClassVar[str] = "State inversion"
    access: ClassVar[Access] = "embedding"
    note: ClassVar[str] = "all text states of a prompt are optimised"
    Settings: ClassVar[type[Any]] = StateInversionSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": StateInversionSettings(learning_rates=(0.02, 0.2)),
        "full": StateInversionSettings(),
    }
    settings: StateInversionSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        if TOKEN_STATES not in target.family.empty.tensors:
            return f"{target.family.name} models have no token states"
        return None

    def calls(self, task: Task, sampling: Sampling) -> int:
        settings = self.settings
        inversion = len(task.concepts) * settings.steps * settings.batch_size
        return len(settings.learning_rates) * (inversion + sampling.calls(len(task)))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        for rate in self.settings.learning_rates:
            found = {concept: self.invert(target, task, concept, rate) for concept in task.concepts}
            asked = Conditioning.cat([found[concept] for concept in task.shown])
            yield Try(f"rate {rate:g}", target.pictures(target.draw(asked, task.noise)))

    def invert(self, target: Target, task: Task, concept: str, rate: float) -> Conditioning:
        """Optimise one set of text states for a concept; returns one row."""
        generator, settings = task.generator(f"{self.name} {concept}"), self.settings
        start = target.encode([task.texts[int(task.rows(concept)[0])]]).to(target.device)
        start = target.family.with_guidance(start, target.guidance_scale)
        free = (name for name in (TOKEN_STATES, POOLED) if name in start.tensors)
        states = {name: start.tensors[name].clone().requires_grad_() for name in free}
        optimizer = torch.optim.Adam(states.values(), lr=rate)
        schedule = get_wsd_schedule(
            optimizer, 0, settings.steps // 3, num_training_steps=settings.steps, decay_type="linear"
        )
        latents = task.examples.latents[task.examples.showing(concept)]
        for _ in range(settings.steps):
            x_t, t, wanted = target.noised(latents, settings.batch_size, generator)
            rows = {name: tensor.expand(len(t), *tensor.shape[1:]) for name, tensor in states.items()}
            asked = Conditioning({**start.repeat(len(t)).tensors, **rows})
            loss = F.mse_loss(target.family.predict(x_t, t, asked), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return Conditioning({**start.tensors, **{name: tensor.detach() for name, tensor in states.items()}})
