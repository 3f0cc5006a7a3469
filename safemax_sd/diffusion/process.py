"""The noise process of a model and, in every parametrisation, the prediction of maximum entropy.

Among all densities with zero mean and identity covariance N(0, I) has the largest entropy. Latents are scaled to unit
variance, so the maximum-entropy answer to a prompt is p(x0 | prompt) = N(0, I). Put z ~ N(0, I) for x0 into the
forward process: the best prediction of the native target given x_t is linear in x_t, and `max_entropy_target` is it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from safemax_sd.core.errors import OptionError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def _like(values: Tensor, x: Tensor) -> Tensor:
    """[B] in the shape that multiplies [B, ...]."""
    return values.to(x).view(-1, *[1] * (x.dim() - 1))


class DiffusionProcess(ABC):
    """Noise mathematics as pure tensor functions; `t` is the model's native time, shape [B]."""

    @abstractmethod
    def sample_times(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` native times drawn as in the model's training, [n]."""

    @abstractmethod
    def all_times(self) -> Tensor:
        """The native times of training from clean to noise, [T]; an even grid of 1000 where they are continuous."""

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """t/T: 0 (clean) to 1 (noise), float32 [B]."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of x_t = a·x0 + s·noise, each [B]."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model is trained to predict, [B, ...]."""

    @abstractmethod
    def max_entropy_target(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[target | x_t] for x0 ~ N(0, I): the closed form, native parametrisation, [B, ...]."""

    @abstractmethod
    def coordinate(self, t: Tensor) -> Tensor:
        """What the sampler's path is followed in: dx/d(coordinate) is a velocity, [B]."""

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """What a native prediction gains per unit of that velocity, [B]."""

    def halted_std(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t for x0 ~ N(0, I), [B]: of halted noise, on its way to unit variance."""
        return torch.hypot(*self.coefficients(t))

    def halted(self, noise: Tensor, t: Tensor) -> Tensor:
        """Noise of unit spread with the spread that it has at t on the path of a halted sampler, [B, ...]."""
        return _like(self.halted_std(t), noise) * noise

    def removal(self, offset: Tensor, t: Tensor) -> Tensor:
        """What to add to a native prediction so that a deterministic sampler removes `offset` from x_t; [B, ...].

        The maximum-entropy prediction keeps halted noise such, and carries an offset along with it. With this added,
        the offset shrinks at unit rate in the coordinate.
        """
        return _like(self.slope(t), offset) * offset

    def step(self, x_t: Tensor, prediction: Tensor, t: Tensor, following: Tensor) -> Tensor:
        """Where a step along the sampler's path ends, [B, ...]: exact for halted noise, Euler in what differs from it.

        With y = x/halted_std the path is dy/d(coordinate) = (velocity − that of halted noise)/halted_std.
        """
        velocity = (prediction - self.max_entropy_target(x_t, t)) / _like(self.slope(t), x_t)
        moved = x_t + _like(self.coordinate(following) - self.coordinate(t), x_t) * velocity
        return _like(self.halted_std(following) / self.halted_std(t), x_t) * moved

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a·x0 + s·noise, [B, ...]."""
        a, s = self.coefficients(t)
        return _like(a, x0) * x0 + _like(s, x0) * noise


class VariancePreserving(DiffusionProcess):
    """x_t = a·x0 + s·ε with a² + s² = 1 (DDPM, arXiv 2006.11239, eq. 4); native time is an integer timestep.

    Args:
        alphas_cumprod: a² at every timestep, [T].
        prediction_type: `epsilon`, `v_prediction` (arXiv 2202.00512) or `sample`.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise OptionError("--prediction_type", prediction_type, f"must be one of {', '.join(PREDICTION_TYPES)}")
        if prediction_type == "epsilon" and float(alphas_cumprod[-1]) == 0:
            text = (
                "says nothing of the picture where the schedule ends in pure noise (rescale_betas_zero_snr): give "
                "--prediction_type v_prediction if that is what the model was trained for"
            )
            raise OptionError("--prediction_type", prediction_type, text)
        self.alphas_cumprod = alphas_cumprod.float()
        self.prediction_type = prediction_type

    def sample_times(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(len(self.alphas_cumprod), (n,), generator=generator)

    def all_times(self) -> Tensor:
        return torch.arange(len(self.alphas_cumprod))

    def noise_level(self, t: Tensor) -> Tensor:
        return t.float() / (len(self.alphas_cumprod) - 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.alphas_cumprod.to(t.device)[t.long()]
        return signal.sqrt(), (1 - signal).sqrt()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, s = self.coefficients(t)
        return _like(a, x0) * noise - _like(s, x0) * x0

    def max_entropy_target(self, x_t: Tensor, t: Tensor) -> Tensor:
        a, s = self.coefficients(t)
        if self.prediction_type == "epsilon":
            return _like(s, x_t) * x_t
        if self.prediction_type == "sample":
            return _like(a, x_t) * x_t
        return torch.zeros_like(x_t)

    def coordinate(self, t: Tensor) -> Tensor:
        """The angle φ of a = cos φ, s = sin φ: the path is dx/dφ = v (arXiv 2202.00512)."""
        a, s = self.coefficients(t)
        return torch.atan2(s, a)

    def slope(self, t: Tensor) -> Tensor:
        """Of ε = s·x + a·v, x0 = a·x − s·v, or v itself."""
        a, s = self.coefficients(t)
        return {"epsilon": a, "sample": -s, "v_prediction": torch.ones_like(a)}[self.prediction_type]

    def halted_std(self, t: Tensor) -> Tensor:
        """1, as a² + s² is."""
        return torch.ones(len(t), device=t.device)


class FlowMatching(DiffusionProcess):
    """x_t = (1 - σ)·x0 + σ·ε, velocity ε - x0 (rectified flow, arXiv 2209.03003); native time is 1000·σ.

    Args:
        num_train_timesteps: Scale of the native time.
        shift: The schedule's shift: training and sampling spend more time at high noise (arXiv 2403.03206, eq. 23).
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self.num_train_timesteps, self.shift = num_train_timesteps, shift

    def sample_times(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        uniform = torch.rand(n, generator=generator)
        return self._shifted(uniform)

    def all_times(self) -> Tensor:
        return self._shifted((torch.arange(1000) + 0.5) / 1000)

    def _shifted(self, uniform: Tensor) -> Tensor:
        return self.num_train_timesteps * self.shift * uniform / (1 + (self.shift - 1) * uniform)

    def noise_level(self, t: Tensor) -> Tensor:
        return t.float() / self.num_train_timesteps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.noise_level(t)
        return 1 - sigma, sigma

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def max_entropy_target(self, x_t: Tensor, t: Tensor) -> Tensor:
        sigma = _like(self.noise_level(t), x_t)
        return (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2) * x_t

    def coordinate(self, t: Tensor) -> Tensor:
        """σ: the path is dx/dσ = v."""
        return self.noise_level(t)

    def slope(self, t: Tensor) -> Tensor:
        return torch.ones(len(t), device=t.device)


class VarianceExploding(DiffusionProcess):
    """x_t = x0 + σ·ε, ε-prediction (arXiv 2011.13456); native time is σ itself.

    Args:
        sigma_min: Lowest noise, above 0.
        sigma_max: Highest noise.
    """

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sample_times(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self._geometric(torch.rand(n, generator=generator))

    def all_times(self) -> Tensor:
        return self._geometric((torch.arange(1000) + 0.5) / 1000)

    def _geometric(self, uniform: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** uniform

    def noise_level(self, t: Tensor) -> Tensor:
        low, high = torch.tensor(self.sigma_min).log(), torch.tensor(self.sigma_max).log()
        return ((t.float().log() - low) / (high - low)).clamp(0, 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t, dtype=torch.float32), t.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def max_entropy_target(self, x_t: Tensor, t: Tensor) -> Tensor:
        sigma = _like(t.float(), x_t)
        return sigma / (1 + sigma**2) * x_t

    def coordinate(self, t: Tensor) -> Tensor:
        """ln σ: the path is dx/d(ln σ) = σ·ε."""
        return t.float().log()

    def slope(self, t: Tensor) -> Tensor:
        return 1 / t.float()


def check_variance_preserving(scheduler: Any) -> None:
    """Check that a scheduler of diffusers stands for a discrete variance-preserving process.

    Raises:
        OptionError: EDM's and other continuous noise levels, flow matching or consistency models.
    """
    config, name = scheduler.config, type(scheduler).__name__
    odd = config.get("timestep_type", "discrete") != "discrete" or config.get("use_flow_sigmas")
    if not hasattr(scheduler, "alphas_cumprod") or odd:
        text = "stands for another noise process than Stable Diffusion's: a discrete schedule of betas is needed"
        raise OptionError("--pretrained_model_name_or_path", f"scheduler {name}", text)


def from_scheduler(scheduler: Any) -> DiffusionProcess:
    """The process of a diffusers scheduler.

    Raises:
        OptionError: A scheduler that is neither variance preserving nor flow matching.
    """
    name = type(scheduler).__name__
    if "FlowMatch" in name:
        return FlowMatching(scheduler.config.num_train_timesteps, float(scheduler.config.get("shift", 1.0)))
    if hasattr(scheduler, "alphas_cumprod"):
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    raise OptionError("--pretrained_model_name_or_path", name, "is a scheduler without a known noise process")
