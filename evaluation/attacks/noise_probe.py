"""Noise probe: sampling with more noise at each step than the sampler takes out, over a grid of strengths.

Source: "When Are Concepts Erased From Diffusion Models?", arXiv 2505.17013; code: kevinlu4588/WhenAreConceptsErased.
There: DDIM of 50 steps at guidance 7.5; with σ the standard deviation of the reverse step (arXiv 2010.02502, eq. 16),
x' = a'·x0 + √|s'² − (ησ)²|·ε + v·ησ·z, for η in {1, 1.17, 1.34, 1.51, 1.68, 1.85} and v in {1, 1.02, 1.03, 1.04};
one random generator runs through the 24 pictures of a prompt, so that each begins at a noise of its own; the picture
that a classifier likes most counts.

Deviations: steps and guidance scale are those of the run. "Likes most" becomes "any of the 24 succeeds", which is the
same where a success is what is counted. The first picture begins at the task's noise, so that it compares with the
plain prompts. Flow matching takes the same formula, with the σ of x_t = a·x0 + s·ε for any a and s.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.steps import Step, walk
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor


@dataclass(frozen=True)
class NoiseProbeSettings:
    """Settings of the noise probe; each pair is a try.

    Attributes:
        etas: Factors η of the noise of a step; at 1 the sampler is DDPM's.
        variance_scales: Factors v of the added noise alone.
    """

    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    variance_scales: tuple[float, ...] = (1.0, 1.02, 1.03, 1.04)


class NoiseProbe(Attack):
    """Stochastic sampling with too much noise, best of a grid."""

    name: ClassVar[str] = "noise_probe"
    label: ClassVar[str] = "Noise probe"
    access: ClassVar[Access] = "latent"
    paper: ClassVar[str] = "arXiv 2505.17013"
    note: ClassVar[str] = "each sampling step adds noise, best of several strengths"
    any_try: ClassVar[bool] = True
    Settings: ClassVar[type[Any]] = NoiseProbeSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": NoiseProbeSettings(etas=(1.0, 1.85), variance_scales=(1.04,)),
        "full": NoiseProbeSettings(),
    }
    settings: NoiseProbeSettings

    def calls(self, task: Task, sampling: Sampling) -> int:
        return len(self.settings.etas) * len(self.settings.variance_scales) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        asked = target.encode(task.texts)
        for place, (eta, scale) in enumerate(product(self.settings.etas, self.settings.variance_scales)):
            name = f"η {eta:g}, v {scale:g}"
            # A generator for each picture, so that they do not depend on how many are drawn together.
            generators = [task.generator(f"{self.name} {name} {number}") for number in range(len(task))]
            noise = drawn(generators, task.noise) if place else task.noise
            follow = partial(follow_noisily, generators=generators, eta=eta, variance_scale=scale)
            yield Try(name, target.pictures(walk(target, asked, noise, follow)))


def follow_noisily(
    step: Step,
    x_t: Tensor,
    prediction: Tensor,
    rows: Tensor,
    *,
    generators: list[torch.Generator],
    eta: float,
    variance_scale: float,
) -> Tensor:
    """Return the latents after `noisy_step`, with noise by the rows' generators."""
    z = drawn([generators[row] for row in rows.tolist()], x_t)
    return noisy_step(step, x_t, prediction, z, eta=eta, variance_scale=variance_scale)


def noisy_step(step: Step, x_t: Tensor, prediction: Tensor, z: Tensor, *, eta: float, variance_scale: float) -> Tensor:
    """Return the latents after a step of DDIM with η, which may be above 1.

    Args:
        step: Step of the deterministic sampler.
        x_t: Latents before it, [B, *latent].
        prediction: Guided native prediction, [B, *latent].
        z: Noise, N(0, I), [B, *latent].
        eta: Factor η of the reverse step's standard deviation.
        variance_scale: Factor of the added noise alone.

    Source: arXiv 2010.02502, eq. 12 and 16; the absolute value below the root is arXiv 2505.17013's, for η above 1.
    """
    clean, noise = step.split(x_t, prediction)
    left = step.signal * step.next_noise / (step.next_signal * step.noise)
    deviation = eta * step.next_noise * max(0.0, 1 - left**2) ** 0.5
    towards = abs(step.next_noise**2 - deviation**2) ** 0.5
    return step.next_signal * clean + towards * noise + variance_scale * deviation * z


def drawn(generators: list[torch.Generator], like: Tensor) -> Tensor:
    """Draw noise for each latent with its own generator, [B, *latent]."""
    noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(noise).to(like.device)
