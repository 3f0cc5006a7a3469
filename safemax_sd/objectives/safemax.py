"""SAFEMax: forbidden prompts get the prediction of maximum entropy, everything else stays.

Source: SAFEMax, arXiv 2508.20773, which gives the idea and the decay D(t) = exp(-λ·t/T) but prints no forget loss. The
closed-form target, the replayed retain targets and the halting of the empty prompt are this project's own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from safemax_sd.core.options import NONZERO_SHARE, NOT_NEGATIVE, POSITIVE, SHARE, option
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import (
    Batch,
    LossTerms,
    Objective,
    ObjectiveOptions,
    Positions,
    Predict,
    Student,
    prior_generator,
)
from safemax_sd.objectives.decay import Decay
from safemax_sd.recording.data import ErasureData

FORGET, RETAIN, NOISE = 0, 1, 2
KEPT_NOISE, KEPT_NOISE_A_STEP, KEPT_AT_ONCE = 2048, 16, 64
"""Noise that prompts to keep are asked about: at most, for each step of a short run, and at once."""
EMPTY_RETAIN_SHARE = 0.25
TRAJECTORY_SHARE = 0.5
HIGH_RETAIN_SHARE = 0.5
"""Of forget samples at high noise levels, on trajectories of prompts to keep: the prompt alone tells them apart."""
DRIFTED_SHARE = 0.5
DRIFT = 0.6
"""Largest standard deviation of what drifted noise holds besides noise."""
SPREADS = (0.5, 1.6)
"""Standard deviations of halted noise, where it is not 1."""
SPREAD_SHARE = 0.5
DRIFTED_BELOW = 0.9
"""Of `halt_below`: higher up, a faint share of a picture is what every kept picture has."""
ROLLOUT_STEPS = 2
ROLLOUT_GUIDANCE = (1.0, 7.5)


@dataclass(frozen=True)
class _Sample:
    """One row, or two of the same input: with a prompt, and with the empty one."""

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor
    weight: float = 1.0
    rollout_guidance: float = 0.0


@dataclass
class SafemaxConfig(ObjectiveOptions):
    """SAFEMax's own flags."""

    train_batch_size: int = option(6)
    max_train_steps: int = option(350)
    learning_rate: float = option(2e-3, "Of AdamW; for prodigy about 1.")
    forget_trajectories: int = option(32, "Trajectories of the frozen model recorded for forbidden prompts.")
    retain_trajectories: int = option(256, "The same for prompts to keep.")
    replay_inference_steps: int = option(6, "Sampling steps of those trajectories.")
    replay_span: float = option(
        0.5, "Share of the training of a LoRA during which trajectories are recorded, evenly; 0: all before it."
    )
    retain_near_share: float = option(
        0.5, "Share of trajectories to keep, of the prompts whose token states are most like forbidden ones."
    )

    decay: Literal["exponential", "constant", "linear", "cutoff"] = option("exponential", "Shape of D(t).")
    decay_lambda: float = option(1.0, "λ in D(t) = exp(-λ·t/T).", NOT_NEGATIVE)
    target: Literal["closed_form", "sampled"] = option("closed_form", "Maximum-entropy target or draws of it.")
    target_guidance: float = option(4.0, "Guidance scale up to which outputs are trained to be noise.", POSITIVE)
    halt_unconditional: float = option(0.33, "Share of forget samples on noise that must stay noise.", SHARE)
    halt_below: float = option(0.6, "Highest t/T of those samples.", NONZERO_SHARE)
    halt_rollout: float = option(0.5, "Share of those to which the student itself has sampled.", SHARE)
    halt_restoring: float = option(
        1.0, "Rate at which noise that is off N(0, I) is drawn back to it; 0: it stays.", NOT_NEGATIVE
    )
    retain_noise: float = option(
        0.0, "Share of retain samples on that noise: there only the empty prompt is to halt.", SHARE
    )


@dataclass(frozen=True)
class SafemaxBatch(Batch):
    """Samples of one step.

    Attributes:
        weight: Of each sample's squared error, [B].
        empty_row: Row of the same input with the empty prompt, of which a guided prediction starts; -1 where the batch
            holds none; int64 [B].
        rollout_guidance: Guidance scale at which the student samples from noise, which x_t then is, down to t, where it
            is asked; 0 where x_t itself is asked; [B].
    """

    weight: Tensor
    empty_row: Tensor
    rollout_guidance: Tensor

    @property
    def model_calls(self) -> int:
        return len(self.t) + ROLLOUT_STEPS * int((self.rollout_guidance > 0).sum())


class Safemax(Objective):
    """D(t)·‖f(x_t, t, c_f) − max_entropy_target‖² + retain_weight·‖f(x_t, t, c_r) − f_frozen(x_t, t, c_r)‖²."""

    name: ClassVar[str] = "safemax"
    paper: ClassVar[str] = "arXiv 2508.20773"
    Config: ClassVar[type[ObjectiveOptions]] = SafemaxConfig
    config: SafemaxConfig

    def __init__(self, config: SafemaxConfig, data: ErasureData) -> None:
        self.config = config
        self.decay = Decay(config.decay, config.decay_lambda)
        # Where guidance is an input of the network, a sampler follows its one prediction and nothing is overshot.
        self.target_guidance = config.target_guidance if data.classifier_free else 1.0
        self.rollout_guidance = ROLLOUT_GUIDANCE if data.classifier_free else (1.0, 1.0)
        self.extend(data)

    def extend(self, data: ErasureData) -> None:
        super().extend(data)
        levels = data.process.noise_level(data.forget_bank.t)
        self.high_rows = torch.nonzero(levels >= self.config.halt_below).flatten()
        banks = (data.forget_bank, data.retain_bank)
        self.guided_rows = [(bank, torch.nonzero(self._guided(bank.t)).flatten()) for bank in banks]

    def prepare(self, student: Student) -> int:
        """Ask the model, while it is the base, what prompts to keep show on noise that its trajectories never pass."""
        if not self.config.retain_noise:
            return 0
        rows = []
        count = -(-min(KEPT_NOISE, KEPT_NOISE_A_STEP * self.config.max_train_steps) // KEPT_AT_ONCE)
        for number in tqdm(range(count), desc="noise to keep", unit="batch"):
            generator = prior_generator(self.config.seed, NOISE, number)
            noise = torch.cat([torch.add(*self._spread_noise(generator)) for _ in range(KEPT_AT_ONCE)])
            t = torch.cat([self._time_below(self.config.halt_below, generator) for _ in range(KEPT_AT_ONCE)])
            x_t = self.data.process.halted(noise, t)
            prompt = torch.randint(len(self.data.retain), (KEPT_AT_ONCE,), generator=generator)
            asked = (x_t.to(student.device), t.to(student.device), self.data.retain.select(prompt).to(student.device))
            with torch.no_grad():
                rows.append((x_t, t, prompt, student.predict(*asked).cpu()))
        self.kept_noise = tuple(torch.cat(column) for column in zip(*rows, strict=True))
        return count * KEPT_AT_ONCE

    def draw(self, positions: Positions) -> SafemaxBatch:
        forget = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        retain = [self._retain(positions.generator(RETAIN, number)) for number in positions.retain]
        samples = forget + retain
        t = torch.cat([sample.t for sample in samples])
        is_forget = torch.arange(len(t)) < sum(len(sample.t) for sample in forget)
        empty_row = _empty_rows([len(sample.t) for sample in samples])
        return SafemaxBatch(
            x_t=torch.cat([sample.x_t for sample in samples]),
            t=t,
            conditioning=Conditioning.cat([sample.conditioning for sample in samples]),
            target=torch.cat([sample.target for sample in samples]),
            # D(t) weighs what a prompt is to forget. Halted noise counts fully: a sampler carries its first errors on.
            weight=torch.tensor([sample.weight for sample in samples for _ in sample.t])
            * torch.where(is_forget & ~_in_pair(empty_row), self.decay(self.data.process.noise_level(t)), 1.0),
            is_forget=is_forget,
            empty_row=empty_row,
            rollout_guidance=torch.tensor([sample.rollout_guidance for sample in samples for _ in sample.t]),
        )

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        assert isinstance(batch, SafemaxBatch)
        x_t, target = self._with_rollouts(predict, batch)
        error = predict(x_t, batch.t, batch.conditioning) - target
        paired = batch.empty_row >= 0
        free = error[batch.empty_row[paired]]
        # A guided sampler follows ε_u + w·(ε_c − ε_u). Both aim at the same target, so their errors mix likewise. The
        # mixture's error is affine in w, so it is largest at an end of the range 1 to target_guidance: train both ends.
        guided = free + self.target_guidance * (error[paired] - free)
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

    def _with_rollouts(self, predict: Predict, batch: SafemaxBatch) -> tuple[Tensor, Tensor]:
        """x_t and targets of a batch, after the student has sampled where that is asked for.

        The start noise was to stay. What has come of it, besides itself, is to go.
        """
        rows = torch.nonzero((batch.rollout_guidance > 0) & (batch.empty_row >= 0)).flatten()
        if not len(rows):
            return batch.x_t, batch.target
        reached, end = self._roll_out(predict, batch, rows), batch.t[rows]
        process = self.data.process
        stayed = process.halted(batch.x_t[rows], end)
        restored = self.config.halt_restoring * process.removal(reached - stayed, end)
        halted = process.max_entropy_target(reached, end) + restored
        x_t, target = batch.x_t.clone(), batch.target.clone()
        for pair in (rows, batch.empty_row[rows]):
            x_t[pair], target[pair] = reached, halted
        return x_t, target

    def _roll_out(self, predict: Predict, batch: SafemaxBatch, rows: Tensor) -> Tensor:
        """Where the student gets to from x_t of some rows in a few guided steps."""
        grid = self.data.process.all_times().to(batch.t)
        last = torch.searchsorted(grid, batch.t[rows]).clamp(max=len(grid) - 1)
        shares = [step / ROLLOUT_STEPS for step in range(ROLLOUT_STEPS)]
        times = [grid[((1 - share) * (len(grid) - 1) + share * last).round().long()] for share in shares]
        asked = batch.conditioning.select(torch.cat([rows, batch.empty_row[rows]]))
        x = self.data.process.halted(batch.x_t[rows], times[0])
        scale = batch.rollout_guidance[rows].view(-1, *[1] * (x.dim() - 1))
        with torch.no_grad():
            for t, following in itertools.pairwise([*times, batch.t[rows]]):
                conditional, free = predict(torch.cat([x, x]), torch.cat([t, t]), asked).chunk(2)
                x = self.data.process.step(x, free + scale * (conditional - free), t, following)
        # Older PyTorch keeps autocast's copies of the weights, and those made here know no gradient.
        torch.clear_autocast_cache()
        return x

    def _forget(self, generator: torch.Generator) -> _Sample:
        """A forget sample: pure noise or a frozen trajectory of a forbidden prompt, or noise that must stay noise."""
        if self.config.halt_unconditional > 0 and torch.rand((), generator=generator) < self.config.halt_unconditional:
            return self._halt(generator)
        bank = self.data.forget_bank
        row = torch.randint(len(bank), (1,), generator=generator)
        if torch.rand((), generator=generator) < TRAJECTORY_SHARE:
            x_t, t = bank.x_t[row], bank.t[row]
        else:
            noise, t = self._noise(generator), self.data.process.sample_times(1, generator)
            x_t = self.data.process.halted(noise, t)
        conditioning = self._forbidden(bank.prompt[row], generator)
        recorded, rows = self.guided_rows[int(torch.rand((), generator=generator) < HIGH_RETAIN_SHARE)]
        if not (len(rows) and bool(self._guided(t))):
            return _Sample(x_t, t, conditioning, self._target(x_t, t, generator))
        # The target needs the unconditional prediction, which is recorded on the trajectories only.
        row = rows[torch.randint(len(rows), (1,), generator=generator)]
        x_t, t, free = recorded.x_t[row], recorded.t[row], recorded.unconditional[row]
        target = free + (self._target(x_t, t, generator) - free) / self.target_guidance
        # A sampler multiplies this error by the guidance scale.
        return _Sample(x_t, t, conditioning, target, weight=self.target_guidance)

    def _guided(self, t: Tensor) -> Tensor:
        """Whether `target_guidance` bears on the target at native times [N]; bool [N].

        A guided sampler returns ε_u + w·(ε_c − ε_u). Where ε_u is halted too, both are the same and no w matters; where
        ε_u stays as it is, ε_c on the target is overshot w times, which blows the output up.
        """
        if self.target_guidance == 1.0:
            return torch.zeros(len(t), dtype=torch.bool)
        if self.config.halt_unconditional == 0:
            return torch.ones(len(t), dtype=torch.bool)
        return self.data.process.noise_level(t) >= self.config.halt_below

    def _halt(self, generator: torch.Generator) -> _Sample:
        """Noise at a noise level where no kept picture passes it, with a forbidden and with the empty prompt.

        What is off pure noise in it, a trace of a picture or another spread, is to go: a sampler's first errors would
        otherwise be carried on, or grow. Some of these errors are made up here, the others the student makes.
        """
        process, limit, guidance = self.data.process, self.config.halt_below, 0.0
        if torch.rand((), generator=generator) < self.config.halt_rollout:
            noise = self._noise(generator)
            offset = torch.zeros_like(noise)
            low, high = self.rollout_guidance
            guidance = low + (high - low) * float(torch.rand((), generator=generator))
        elif len(self.high_rows) > 0 and torch.rand((), generator=generator) < DRIFTED_SHARE:
            noise, offset = self._drifted_noise(generator)
            limit *= DRIFTED_BELOW
        else:
            noise, offset = self._spread_noise(generator)
        t = self._time_below(limit, generator)
        row = torch.randint(len(self.data.forget), (1,), generator=generator)
        # What is to be sampled from stays of unit spread here: its noise level is another.
        x_t = noise if guidance else process.halted(noise + offset, t)
        restored = self.config.halt_restoring * process.removal(process.halted(offset, t), t)
        target = self._target(x_t, t, generator) + restored
        return _Sample(
            x_t=torch.cat([x_t, x_t]),
            t=torch.cat([t, t]),
            conditioning=Conditioning.cat([self._forbidden(row, generator), self.data.empty]),
            target=torch.cat([target, target]),
            rollout_guidance=guidance,
        )

    def _time_below(self, limit: float, generator: torch.Generator) -> Tensor:
        """A native time, [1], at a noise level below a limit."""
        process = self.data.process
        t = process.sample_times(1, generator)
        while float(process.noise_level(t)) >= limit:
            t = process.sample_times(1, generator)
        return t

    def _spread_noise(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pure noise of unit spread, and what some of it has too much or too little of itself."""
        noise = self._noise(generator)
        low, high = SPREADS
        chosen, amount = torch.rand(2, generator=generator).tolist()
        return noise, (low + (high - low) * amount - 1) * noise * (chosen < SPREAD_SHARE)

    def _drifted_noise(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What an erased sampler carries on from the highest noise levels, where the empty prompt still acts.

        It is noise of unit spread, and a faint share of what the empty prompt shows, more or less of it as guidance and
        the errors of the first steps have it.
        """
        bank = self.data.forget_bank
        row = self.high_rows[torch.randint(len(self.high_rows), (1,), generator=generator)]
        x_t, t = bank.x_t[row], bank.t[row]
        pull = self.data.process.max_entropy_target(x_t, t) - bank.unconditional[row]
        length = DRIFT * (2 * torch.rand((), generator=generator) - 1)
        return x_t / self.data.process.halted(torch.ones_like(x_t), t), length * pull / pull.square().mean().sqrt()

    def _retain(self, generator: torch.Generator) -> _Sample:
        if self.config.retain_noise and torch.rand((), generator=generator) < self.config.retain_noise:
            row = torch.randint(len(self.kept_noise[0]), (1,), generator=generator)
            x_t, t, prompt, target = (column[row] for column in self.kept_noise)
            return _Sample(x_t, t, self._kept(prompt, generator), target)
        bank = self.data.retain_bank
        row = torch.randint(len(bank), (1,), generator=generator)
        if torch.rand((), generator=generator) < EMPTY_RETAIN_SHARE:
            return _Sample(bank.x_t[row], bank.t[row], self.data.empty, bank.unconditional[row])
        conditioning = self._kept(bank.prompt[row], generator)
        return _Sample(bank.x_t[row], bank.t[row], conditioning, bank.conditional[row])

    def _forbidden(self, rows: Tensor, generator: torch.Generator) -> Conditioning:
        """Conditioning of forbidden prompts."""
        return self.data.forget.select(rows)

    def _kept(self, rows: Tensor, generator: torch.Generator) -> Conditioning:
        """Conditioning of prompts to keep."""
        return self.data.retain.select(rows)

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
    """`SafemaxBatch.empty_row` of samples of one row or of two, the second being the empty prompt's."""
    rows: list[int] = []
    for size in sizes:
        rows += [-1] if size == 1 else [len(rows) + 1, -1]
    return torch.tensor(rows)


def _in_pair(empty_row: Tensor) -> Tensor:
    """Whether a row is one of the two of a halted sample; bool [B]."""
    inside = empty_row >= 0
    inside[empty_row[inside]] = True
    return inside
