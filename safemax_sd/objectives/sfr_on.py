"""SFR-on: gradient ascent on the forget loss in salient weights, alternating with descent on the retain loss.

Source: Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement, arXiv 2409.19732; settings of the
DDPM experiments in K1nght/Unified-Unlearning-w-Remain-Geometry. One of its iterations is two steps of one AdamW here:
an even, fast step forgets, and the odd, slow step after it retains. The slow step starts at the weights that the fast
step reached, so it carries the curvature of the retain loss there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from tqdm import tqdm

from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, option
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import LossTerms, Objective, Predict, Student
from safemax_sd.objectives.batches import Batch, Positions, draw_noised, drop_prompt, prior_generator
from safemax_sd.objectives.options import FullWeightsConfig, ObjectiveOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds
from safemax_sd.recording.replay import Samples

FORGET, RETAIN, FORGET_FISHER, RETAIN_FISHER = 0, 1, 2, 3
TINY_LOSS = 1e-8
TINY_FISHER = 1e-15


@dataclass
class SfrOnConfig(FullWeightsConfig):
    """Flags of SFR-on, and its published settings of other flags."""

    forget_weight: float = option(10.0, "Initial weight of the forget loss, which falls to 0 by a cosine.", POSITIVE)
    adaptive_power: float = option(0.5, "Power λ: a forget sample is weighted by its loss to the −λ.", NOT_NEGATIVE)
    saliency_threshold: float = option(
        1.0, "Smallest ratio γ of forget to retain Fisher information of weights that forget.", NOT_NEGATIVE
    )
    fisher_batch_size: int = option(128, "Samples averaged before a gradient is squared.", POSITIVE)
    retain_weight: float = option(1.0)
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to, also for the Fisher information.")
    max_train_steps: int = option(300, "Optimizer steps, in turn fast (forget) and slow (retain).")
    forget_trajectories: int = option(1000, "Samples of forget prompts without --train_data_dir.")
    retain_trajectories: int = option(1000, "Samples of retain prompts without --train_data_dir.")


@dataclass(frozen=True)
class SfrOnBatch(Batch):
    """Samples of one kind: forget samples in a fast step, retain samples in a slow one.

    Attributes:
        weight: Weight of the step's loss, a scalar.
    """

    weight: Tensor


class SfrOn(Objective):
    """SFR-on: in turn −w_k·Σ a_i·ℓ_i/n in salient weights and ‖ε − ε_θ(x_t, t, c_r)‖² in all.

    ℓ_i = ‖ε − ε_θ(x_t, t, c_f)‖²; a_i is ℓ_i^(−λ) over its mean, without gradient; w_k falls by a cosine. Losses are
    sums over a sample's elements, as published: gradients are clipped to a norm, so the scale of a loss matters.
    """

    name: ClassVar[str] = "sfr_on"
    Config: ClassVar[type[ObjectiveOptions]] = SfrOnConfig
    allowed_weights: ClassVar[frozenset[str]] = frozenset({"full"})
    iteration_steps: ClassVar[int] = 2  # fast, then slow
    depends_on_length: ClassVar[bool] = True
    config: SfrOnConfig

    def __init__(self, config: SfrOnConfig, data: ErasureData) -> None:
        self.config, self.data = config, data
        self.parameters: list[nn.Parameter] = []
        self.mask: list[Tensor] = []
        self.mean_coefficients: list[Tensor] = []

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        return ReplayNeeds("samples")

    def prepare(self, student: Student) -> int:
        data = self.data
        self.parameters = list(student.parameters)
        forget = self._fisher(student, data.forget_samples, data.forget, FORGET_FISHER)
        retain = self._fisher(student, data.retain_samples, data.retain, RETAIN_FISHER)
        # One mask for all processes: gradients on a GPU are not the same bit for bit.
        self.mask = broadcast(salient(forget, retain, self.config.saliency_threshold))
        return len(data.forget_samples) + len(data.retain_samples)

    def draw(self, positions: Positions) -> SfrOnBatch:
        fast = positions.step % self.iteration_steps == 0
        kind, numbers = (FORGET, positions.forget) if fast else (RETAIN, positions.retain)
        drawn = [self._sample(positions.generator(kind, number), forget=fast) for number in numbers]
        x0, noise, t, conditioning = zip(*drawn, strict=True)
        clean, noises, times = torch.cat(x0), torch.cat(noise), torch.cat(t)
        weight = self._forget_weight(positions.step // self.iteration_steps) if fast else self.config.retain_weight
        return SfrOnBatch(
            x_t=self.data.process.add_noise(clean, noises, times),
            t=times,
            conditioning=Conditioning.cat(conditioning),
            target=self.data.process.target(clean, noises, times),
            is_forget=torch.full((len(times),), fast),
            weight=torch.tensor(weight),
        )

    def _forget_weight(self, iteration: int) -> float:
        share = iteration / (self.config.max_train_steps / self.iteration_steps)
        return self.config.forget_weight * (1 + math.cos(math.pi * share)) / 2

    def _sample(self, generator: torch.Generator, *, forget: bool) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """Draw a clean sample with its noise, native time and conditioning, each of one row."""
        data = self.data
        samples, rows = (data.forget_samples, data.forget) if forget else (data.retain_samples, data.retain)
        x0, noise, t, prompt = draw_noised(samples, data.process, generator)
        return x0, noise, t, drop_prompt(rows, prompt, data.empty, generator)

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        assert isinstance(batch, SfrOnBatch)
        error = predict(batch.x_t, batch.t, batch.conditioning) - batch.target
        losses = error.square().flatten(1).sum(1)
        mean = error.detach().square().mean()
        if not batch.is_forget.any():
            return LossTerms(total=batch.weight * losses.mean(), parts={"retain": mean})
        coefficients = 1 / (losses.detach() ** self.config.adaptive_power + TINY_LOSS)
        self.mean_coefficients.append(coefficients.mean())
        return LossTerms(total=-batch.weight * (coefficients * losses).mean(), parts={"forget": mean})

    def before_clipping(self) -> None:
        """Mask a fast step's gradients, and divide them by the mean coefficient of all its samples.

        A micro-batch or process knows only part of the step's samples, so the loss cannot divide by their mean.
        """
        if not self.mean_coefficients:  # a slow step
            return
        mean = reduce(torch.stack(self.mean_coefficients).mean(), reduction="mean")
        self.mean_coefficients.clear()
        for parameter, mask in zip(self.parameters, self.mask, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(mask).div_(mean)

    def _fisher(self, student: Student, samples: Samples, conditioning: Conditioning, kind: int) -> list[Tensor]:
        """Return the squared gradient of a batch's mean loss, averaged over batches, for each parameter.

        Each sample has one noise level. Gradients are clipped to a norm before they are squared, which makes the forget
        and retain values comparable whatever the size of their losses.
        """
        fisher = [torch.zeros_like(parameter) for parameter in student.parameters]
        rows, size = conditioning.to(student.device), self.config.fisher_batch_size
        starts = range(0, len(samples), size)
        for start in tqdm(starts, desc="Fisher information", unit="batch"):
            x0, prompt = samples.x0[start : start + size], samples.prompt[start : start + size]
            generators = [prior_generator(self.config.seed, kind, start + place) for place in range(len(x0))]
            noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
            t = torch.cat([self.data.process.schedule.sample_times(1, generator) for generator in generators])
            x_t, target = self.data.process.add_noise(x0, noise, t), self.data.process.target(x0, noise, t)
            error = student.predict(x_t.to(student.device), t.to(student.device), rows.select(prompt))
            loss = (error - target.to(student.device)).square().flatten(1).sum(1).mean()
            gradients = torch.autograd.grad(loss, student.parameters)
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            scale = (self.config.max_grad_norm / norm).clamp(max=1)
            for total, gradient in zip(fisher, gradients, strict=True):
                total += (scale * gradient).square() / len(starts)
        return fisher


def salient(forget: list[Tensor], retain: list[Tensor], threshold: float) -> list[Tensor]:
    """Return masks of weights whose forget Fisher information is at least `threshold` times the retain one.

    Args:
        forget: Fisher information of the forget samples, for each parameter.
        retain: Fisher information of the retain samples, for each parameter.
        threshold: Smallest ratio, γ.

    Returns:
        Mask of each parameter: 1 for a salient weight, 0 for all others.
    """
    pairs = zip(forget, retain, strict=True)
    return [((one + TINY_FISHER) / (other + TINY_FISHER) >= threshold).to(one.dtype) for one, other in pairs]
