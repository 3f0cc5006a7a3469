"""Steps of a target's deterministic sampler, for attacks that change what happens at each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from safemax_sd.evaluation.attacks.target import Target
from torch import Tensor

from safemax_sd.families import Conditioning


@dataclass(frozen=True)
class Step:
    """One step, from x_t = a·x0 + s·ε to a'·x0 + s'·ε.

    Attributes:
        t: Native time before the step, a scalar.
        signal: Coefficient a.
        noise: Coefficient s.
        next_signal: Coefficient a'.
        next_noise: Coefficient s'.
        signal_share: Coefficient of x0 in the native prediction.
        noise_share: Coefficient of ε in the native prediction.
    """

    t: Tensor
    signal: float
    noise: float
    next_signal: float
    next_noise: float
    signal_share: float
    noise_share: float

    def split(self, x_t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x0 and ε that a native prediction stands for, each [B, *latent]."""
        clean = (self.noise_share * x_t - self.noise * prediction) / self._determinant
        noise = (self.signal * prediction - self.signal_share * x_t) / self._determinant
        return clean, noise

    @property
    def kept(self) -> float:
        """Factor of x_t in the step, which is linear in x_t and the native prediction."""
        turned = self.next_signal * self.noise_share - self.next_noise * self.signal_share
        return turned / self._determinant

    @property
    def added(self) -> float:
        """Factor of the native prediction in the step."""
        return (self.next_noise * self.signal - self.next_signal * self.noise) / self._determinant

    @property
    def _determinant(self) -> float:
        return self.signal * self.noise_share - self.noise * self.signal_share


Follow = Callable[[Step, Tensor, Tensor, Tensor], Tensor]
"""Function of a step, x_t, its guided native prediction and the rows' indices; returns the latents after it."""


def sampler_steps(target: Target) -> list[Step]:
    """Return the steps that `Target.draw` takes, as the family's own sampler takes them."""
    family, process = target.family, target.family.process
    scheduler = family.sampler()
    latents = torch.zeros(1, *target.latent_shape, device=target.device)
    family.set_timesteps(scheduler, target.sampling.num_inference_steps, latents)
    clean = torch.tensor([1.0, 0.0], device=target.device).view(2, 1, 1, 1)
    noise = 1 - clean
    steps = []
    for t in scheduler.timesteps:
        x_t, wanted = (each(clean, noise, t.expand(2)) for each in (process.add_noise, process.target))
        after = scheduler.step(wanted, t, x_t).prev_sample
        steps.append(Step(t, *torch.cat([x_t, after, wanted]).flatten().tolist()))
    return steps


@torch.no_grad()
def guided(target: Target, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the native prediction with guidance, [B, *latent]; the conditioning is one of `with_guidance`."""
    return target.family.predict_guided(x_t, t.expand(len(x_t)), conditioning, guidance_scale=target.guidance_scale)


def walk(target: Target, conditioning: Conditioning, noise: Tensor, follow: Follow) -> Tensor:
    """Draw latents with steps of an attack's own.

    Args:
        target: Target that predicts.
        conditioning: One row for each latent.
        noise: Start noise, [N, *latent].
        follow: Step of the attack.

    Returns:
        Latents, float32 [N, *latent] on the CPU.
    """
    steps, drawn = sampler_steps(target), []
    conditioning = target.family.with_guidance(conditioning, target.guidance_scale)
    for rows in torch.arange(len(noise)).split(target.sampling.batch_size):
        x_t, asked = noise[rows].to(target.device), conditioning.select(rows).to(target.device)
        for step in steps:
            x_t = follow(step, x_t, guided(target, x_t, step.t, asked), rows)
        drawn.append(x_t.cpu())
    return torch.cat(drawn)
