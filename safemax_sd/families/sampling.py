"""Deterministic sampling with guidance: `SampledModel`, which `ModelFamily` extends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safemax_sd.families.conditioning import Conditioning

LOWEST_START = 0.05
"""Largest shift of a sampler's steps below the highest noise level, as a fraction of all levels.

Pure noise cannot start much lower: Stable Diffusion's own sampler starts there with 20 steps.
"""


@dataclass(frozen=True)
class TrajectoryPoint:
    """One step of the frozen model's guided sampling.

    Attributes:
        x_t: Latents before the step, [B, *latent].
        t: Native time, [B].
        conditional: Prediction given the prompt, [B, *latent].
        unconditional: Prediction given the empty prompt, [B, *latent].
        following: Latents after the step, [B, *latent].
    """

    x_t: Tensor
    t: Tensor
    conditional: Tensor
    unconditional: Tensor
    following: Tensor


class SampledModel(ABC):
    """A denoiser with its sampler.

    Attributes:
        denoiser: Network that is trained; its base weights are frozen.
        empty: Conditioning of the empty prompt, one row.
        classifier_free: True if guidance mixes the predictions with and without the prompt. Otherwise the guidance
            scale is an input of the network (see `with_guidance`) and a sampler follows its one prediction.
    """

    denoiser: nn.Module
    empty: Conditioning
    classifier_free: bool = True

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        """Return the native prediction.

        Args:
            x_t: Latents, [B, *latent].
            t: Native time, [B].
            conditioning: One row for each latent.
            denoiser: Wrapped network of distributed training; None for the family's own.

        Returns:
            Prediction, float32 [B, *latent].
        """

    @abstractmethod
    def sampler(self) -> Any:
        """Build a deterministic scheduler of diffusers (DDIM or Euler) for the model's process, starting at N(0, I)."""

    def predict_both(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the predictions given the prompts and given the empty prompt, from one call of the network."""
        both = Conditioning.cat([conditioning.to(x_t.device), self._empty_for(conditioning).to(x_t.device)])
        conditional, unconditional = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return conditional, unconditional

    def predict_guided(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, *, guidance_scale: float | Tensor
    ) -> Tensor:
        """Return the prediction that a sampler follows; the conditioning is one of `with_guidance`."""
        if self.calls_per_step(guidance_scale) == 1:
            return self.predict(x_t, t, conditioning.to(x_t.device))
        return self._mixed(*self.predict_both(x_t, t, conditioning), guidance_scale)

    def _mixed(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Return ε_u + w·(ε_c − ε_u), or the conditional prediction where the scale is an input of the network."""
        if not self.classifier_free:
            return conditional
        return unconditional + guidance_scale * (conditional - unconditional)

    def calls_per_step(self, guidance_scale: float | Tensor) -> int:
        """Return the network evaluations of a sampling step, per sample: one where guidance mixes nothing."""
        mixes = self.classifier_free and (isinstance(guidance_scale, Tensor) or guidance_scale != 1)
        return 2 if mixes else 1

    def _empty_for(self, conditioning: Conditioning) -> Conditioning:
        """Return the empty prompt's conditioning with as many rows as `conditioning`."""
        return self.empty.repeat(len(conditioning))

    def with_guidance(self, conditioning: Conditioning, guidance_scale: float | Tensor) -> Conditioning:
        """Return the conditioning for sampling at a guidance scale, which may be a tensor [B].

        It is the same at every scale unless the scale is an input of the network.
        """
        return conditioning

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, x_T: Tensor) -> None:
        """Set a sampler's steps for latents like x_T, as the stock pipeline does."""
        scheduler.set_timesteps(num_inference_steps, device=x_T.device)

    def shift_timesteps(self, scheduler: Any, share: float) -> None:
        """Move a sampler's steps, which are equally far apart, by a fraction of a step.

        They move to higher noise levels, or to lower ones if the first is at the highest already ("trailing" spacing).
        Pure noise cannot start much below the highest level, so steps that are far apart move by less than a step.

        Args:
            scheduler: Sampler whose steps are set.
            share: Fraction of a step, 0 to 1.
        """
        levels = scheduler.config.num_train_timesteps
        room = levels - 1 - int(scheduler.timesteps[0])
        if room == 0:
            room = -min(levels // len(scheduler.timesteps) - 1, round(LOWEST_START * levels))
        scheduler.timesteps = scheduler.timesteps + round(share * room)

    @torch.no_grad()
    def trajectory(
        self,
        conditioning: Conditioning,
        x_T: Tensor,
        *,
        guidance_scale: float | Tensor,
        num_inference_steps: int,
        grid_shift: float = 0.0,
        skipped: int = 0,
    ) -> Iterator[TrajectoryPoint]:
        """Sample deterministically with classifier-free guidance, step by step.

        Args:
            conditioning: Conditioning on the prompts, one row for each sample.
            x_T: Start noise, [B, *latent].
            guidance_scale: w in ε_u + w·(ε_c − ε_u), or the network's input; [B, 1, …] for a scale for each sample.
            num_inference_steps: Number of steps.
            grid_shift: Fraction of a step by which the steps are moved, 0 to 1; see `shift_timesteps`.
            skipped: Number of first steps that are left out: x_T are the latents after them.
        """
        scheduler = self._sampler_after(skipped, num_inference_steps, x_T, grid_shift=grid_shift)
        conditioning = self.with_guidance(conditioning.to(x_T.device), guidance_scale)
        x = x_T
        for time in scheduler.timesteps[skipped:]:
            t = time.expand(len(x))
            conditional, unconditional = self.predict_both(x, t, conditioning)
            guided = self._mixed(conditional, unconditional, guidance_scale)
            following = scheduler.step(guided, time, x).prev_sample
            yield TrajectoryPoint(x, t, conditional, unconditional, following)
            x = following

    def _sampler_after(self, skipped: int, num_inference_steps: int, x_T: Tensor, *, grid_shift: float = 0.0) -> Any:
        """Build a sampler with its steps set, of which the first `skipped` are taken already."""
        scheduler = self.sampler()
        self.set_timesteps(scheduler, num_inference_steps, x_T)
        if grid_shift > 0:
            self.shift_timesteps(scheduler, grid_shift)
        if skipped and hasattr(scheduler, "set_begin_index"):  # a sampler that counts its steps itself
            scheduler.set_begin_index(skipped)
        return scheduler

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        x_T: Tensor,
        *,
        guidance_scale: float | Tensor,
        num_inference_steps: int,
        skipped: int = 0,
    ) -> Tensor:
        """Return the latents at the end of `trajectory`, [B, *latent], sampled without dropout."""
        scheduler = self._sampler_after(skipped, num_inference_steps, x_T)
        with self.evaluating():
            return self._sampled(
                conditioning, x_T, scheduler, times=scheduler.timesteps[skipped:], guidance_scale=guidance_scale
            )

    def _sampled(
        self, conditioning: Conditioning, x_T: Tensor, scheduler: Any, *, times: Tensor, guidance_scale: float | Tensor
    ) -> Tensor:
        """Return the latents after some steps of a sampler, [B, *latent]."""
        conditioning = self.with_guidance(conditioning.to(x_T.device), guidance_scale)
        x = x_T
        for time in times:
            guided = self.predict_guided(x, time.expand(len(x)), conditioning, guidance_scale=guidance_scale)
            x = scheduler.step(guided, time, x).prev_sample
        return x

    @torch.no_grad()
    def sample_until(
        self, conditioning: Conditioning, x_T: Tensor, *, guidance_scale: float, num_inference_steps: int, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Sample the first steps of `trajectory`.

        Args:
            conditioning: Conditioning on the prompts, one row for each sample.
            x_T: Start noise, [B, *latent].
            guidance_scale: w in ε_u + w·(ε_c − ε_u), or the network's input.
            num_inference_steps: Number of steps of the whole trajectory.
            steps: Number of steps taken, 0 to `num_inference_steps` − 1.

        Returns:
            x_t after those steps, [B, *latent], and its native time t, [B].
        """
        scheduler = self._sampler_after(0, num_inference_steps, x_T)
        times = scheduler.timesteps[:steps]
        x_t = self._sampled(conditioning, x_T, scheduler, times=times, guidance_scale=guidance_scale)
        return x_t, scheduler.timesteps[steps].expand(len(x_t))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch the denoiser's dropout off inside the block."""
        training = [module for module in self.denoiser.modules() if module.training]
        self.denoiser.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
