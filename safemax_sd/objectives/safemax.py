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
DRIFTED_SHARE = 0.5
DRIFT = 0.6
"""Largest standard deviation of that share in drifted noise."""
DRIFTED_BELOW = 0.9
"""Of `halt_below`: higher up, a faint share of a picture is what every kept picture has."""


@dataclass(frozen=True)
class _Sample:
    """One row, or two of the same input: with a prompt, and with the empty one."""

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
        levels = data.process.noise_level(data.forget_bank.t)
        self.high_rows = torch.nonzero(levels >= config.halt_below).flatten()
        self.guided_rows = torch.nonzero(self._guided(data.forget_bank.t)).flatten()

    def draw(self, positions: Positions) -> Batch:
        forget = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        retain = [self._retain(positions.generator(RETAIN, number)) for number in positions.retain]
        samples = forget + retain
        t = torch.cat([sample.t for sample in samples])
        is_forget = torch.arange(len(t)) < sum(len(sample.t) for sample in forget)
        empty_row = _empty_rows([len(sample.t) for sample in samples])
        return Batch(
            x_t=torch.cat([sample.x_t for sample in samples]),
            t=t,
            conditioning=Conditioning.cat([sample.conditioning for sample in samples]),
            target=torch.cat([sample.target for sample in samples]),
            # D(t) weighs what a prompt is to forget. Halted noise counts fully: a sampler carries its first errors on.
            weight=torch.where(is_forget & ~_in_pair(empty_row), self.decay(self.data.process.noise_level(t)), 1.0),
            is_forget=is_forget,
            empty_row=empty_row,
        )

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        error = predict(batch.x_t, batch.t, batch.conditioning) - batch.target
        paired = batch.empty_row >= 0
        free = error[batch.empty_row[paired]]
        # A guided sampler follows ε_u + w·(ε_c − ε_u). Both aim at the same target, so their errors mix likewise. The
        # mixture's error is affine in w, so it is largest at an end of the range 1 to target_guidance: train both ends.
        guided = free + self.config.target_guidance * (error[paired] - free)
        squared = error.square()
        squared[paired] = (squared[paired] + guided.square()) / 2
        weighted = squared.flatten(1).mean(1) * batch.weight
        # A sample of two rows counts once, so that a mean over micro-batches is the mean over the batch.
        forget = weighted[batch.is_forget].sum() / (batch.is_forget.sum() - paired.sum())
        retain = weighted[~batch.is_forget].mean()
        return LossTerms(
            total=forget + self.config.retain_weight * retain,
            parts={"forget": forget.detach(), "retain": retain.detach()},
        )

    def _forget(self, generator: torch.Generator) -> _Sample:
        """A forget sample: pure noise or a frozen trajectory of a forbidden prompt, or noise that must stay noise."""
        if self.config.halt_unconditional > 0 and torch.rand((), generator=generator) < self.config.halt_unconditional:
            return self._halt(generator)
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

    def _halt(self, generator: torch.Generator) -> _Sample:
        """Pure noise at a noise level where no kept picture passes it, with a forbidden and with the empty prompt."""
        process = self.data.process
        drifted = len(self.high_rows) > 0 and bool(torch.rand((), generator=generator) < DRIFTED_SHARE)
        x_t = self._drifted_noise(generator) if drifted else self._noise(generator)
        limit = self.config.halt_below * (DRIFTED_BELOW if drifted else 1.0)
        t = process.sample_times(1, generator)
        while float(process.noise_level(t)) >= limit:
            t = process.sample_times(1, generator)
        row = torch.randint(len(self.data.forget), (1,), generator=generator)
        conditioning = Conditioning.cat([self.data.forget.select(row), self.data.empty])
        target = self._target(x_t, t, generator)
        return _Sample(torch.cat([x_t, x_t]), torch.cat([t, t]), conditioning, torch.cat([target, target]))

    def _drifted_noise(self, generator: torch.Generator) -> Tensor:
        """What an erased sampler carries on from the highest noise levels, where the empty prompt still acts.

        It is noise with a faint share of what the empty prompt shows, more or less of it as guidance and the errors of
        the first steps have it.
        """
        bank = self.data.forget_bank
        row = self.high_rows[torch.randint(len(self.high_rows), (1,), generator=generator)]
        x_t = bank.x_t[row]
        pull = self.data.process.max_entropy_target(x_t, bank.t[row]) - bank.unconditional[row]
        length = DRIFT * (2 * torch.rand((), generator=generator) - 1)
        return x_t + length * pull / pull.square().mean().sqrt()

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


def _empty_rows(sizes: list[int]) -> Tensor:
    """`Batch.empty_row` of samples of one row or of two, the second being the empty prompt's."""
    rows: list[int] = []
    for size in sizes:
        rows += [-1] if size == 1 else [len(rows) + 1, -1]
    return torch.tensor(rows)


def _in_pair(empty_row: Tensor) -> Tensor:
    """Whether a row is one of the two of a halted sample; bool [B]."""
    inside = empty_row >= 0
    inside[empty_row[inside]] = True
    return inside
