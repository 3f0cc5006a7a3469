"""SAFEMax: forbidden prompts get the prediction of maximum entropy, everything else stays.

Source: SAFEMax, arXiv 2508.20773, which gives the idea and the decay D(t) = exp(-λ·t/T) but prints no forget loss. The
closed-form target, the replayed retain targets and the halting of the empty prompt are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safemax_sd.config import TrainConfig
from safemax_sd.decay import Decay
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import Batch, ErasureData, LossTerms, Objective, Positions, Predict

FORGET, RETAIN = 0, 1
EMPTY_RETAIN_SHARE = 0.25
TRAJECTORY_SHARE = 0.5


@dataclass(frozen=True)
class _Sample:
    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor


class Safemax(Objective):
    """D(t)·‖f(x_t, t, c_f) − max_entropy_target‖² + retain_weight·‖f(x_t, t, c_r) − f_frozen(x_t, t, c_r)‖²."""

    name: ClassVar[str] = "safemax"
    paper: ClassVar[str] = "arXiv 2508.20773"

    def __init__(self, config: TrainConfig, data: ErasureData) -> None:
        self.config, self.data = config, data
        self.decay = Decay(config.decay, config.decay_lambda)
        self.guided_rows = torch.nonzero(self._guided(data.forget_bank.t)).flatten()

    def draw(self, positions: Positions) -> Batch:
        forget = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        retain = [self._retain(positions.generator(RETAIN, number)) for number in positions.retain]
        samples = forget + retain
        t = torch.cat([sample.t for sample in samples])
        weight = torch.ones(len(samples))
        weight[: len(forget)] = self.decay(self.data.process.noise_level(t[: len(forget)]))
        return Batch(
            x_t=torch.cat([sample.x_t for sample in samples]),
            t=t,
            conditioning=Conditioning.cat([sample.conditioning for sample in samples]),
            target=torch.cat([sample.target for sample in samples]),
            weight=weight,
            is_forget=torch.arange(len(samples)) < len(forget),
        )

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        error = (predict(batch.x_t, batch.t, batch.conditioning) - batch.target).square().flatten(1).mean(1)
        weighted = error * batch.weight
        forget = weighted[batch.is_forget].mean()
        retain = weighted[~batch.is_forget].mean()
        return LossTerms(
            total=forget + self.config.retain_weight * retain,
            parts={"forget": forget.detach(), "retain": retain.detach()},
        )

    def _forget(self, generator: torch.Generator) -> _Sample:
        """A forget sample: pure noise or a frozen trajectory of a forbidden prompt, or noise with the empty prompt."""
        if self.config.halt_unconditional > 0 and torch.rand((), generator=generator) < self.config.halt_unconditional:
            return self._halt_empty(generator)
        bank = self.data.forget_bank
        row = torch.randint(len(bank), (1,), generator=generator)
        if torch.rand((), generator=generator) < TRAJECTORY_SHARE:
            x_t, t = bank.x_t[row], bank.t[row]
        else:
            x_t, t = self._noise(generator), self.data.process.sample_times(1, generator)
        if len(self.guided_rows) and bool(self._guided(t)):
            # The target needs the unconditional prediction, which is recorded on the trajectories only.
            row = self.guided_rows[torch.randint(len(self.guided_rows), (1,), generator=generator)]
            x_t, t, free = bank.x_t[row], bank.t[row], bank.unconditional[row]
            target = free + (self._target(x_t, t, generator) - free) / self.config.target_guidance
        else:
            target = self._target(x_t, t, generator)
        return _Sample(x_t, t, self.data.forget.select(bank.prompt[row]), target)

    def _guided(self, t: Tensor) -> Tensor:
        """Whether `target_guidance` bears on the target at native times [N]; bool [N].

        A guided sampler returns ε_u + w·(ε_c − ε_u). Where ε_u is halted too, both are the same and no w matters; where
        ε_u stays as it is, ε_c on the target is overshot w times, which blows the output up.
        """
        config = self.config
        if config.target_guidance == 1.0:
            return torch.zeros(len(t), dtype=torch.bool)
        if config.halt_unconditional == 0:
            return torch.ones(len(t), dtype=torch.bool)
        return self.data.process.noise_level(t) >= config.halt_below

    def _halt_empty(self, generator: torch.Generator) -> _Sample:
        """Pure noise at a noise level where no kept picture ever passes it, with the empty prompt."""
        process = self.data.process
        x_t, t = self._noise(generator), process.sample_times(1, generator)
        while float(process.noise_level(t)) >= self.config.halt_below:
            t = process.sample_times(1, generator)
        return _Sample(x_t, t, self.data.empty, self._target(x_t, t, generator))

    def _retain(self, generator: torch.Generator) -> _Sample:
        bank = self.data.retain_bank
        row = torch.randint(len(bank), (1,), generator=generator)
        if torch.rand((), generator=generator) < EMPTY_RETAIN_SHARE:
            return _Sample(bank.x_t[row], bank.t[row], self.data.empty, bank.unconditional[row])
        conditioning = self.data.retain.select(bank.prompt[row])
        return _Sample(bank.x_t[row], bank.t[row], conditioning, bank.conditional[row])

    def _noise(self, generator: torch.Generator) -> Tensor:
        return torch.randn((1, *self.data.latent_shape), generator=generator)

    def _target(self, x_t: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """The maximum-entropy prediction, or one draw of the variable whose mean it is, given x_t.

        x0 and the noise are jointly Gaussian with x_t, so what a draw differs by from its mean does not depend on x_t:
        it is taken from an independent draw of the same process.
        """
        process = self.data.process
        mean = process.max_entropy_target(x_t, t)
        if self.config.target == "closed_form":
            return mean
        x0, noise = self._noise(generator), self._noise(generator)
        other = process.add_noise(x0, noise, t)
        return mean + process.target(x0, noise, t) - process.max_entropy_target(other, t)
