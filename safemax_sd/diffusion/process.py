"""All noise mathematics, in one coordinate: the angle φ between a clean picture and noise.

With y = x_t/√(a² + s²) and φ = atan2(s, a), y = cos φ·x0 + sin φ·ε, and its velocity is v = dy/dφ = cos φ·ε − sin φ·x0:
(y, v) is (x0, ε) turned by φ (for a² + s² = 1: arXiv 2202.00512, app. D). Every native prediction is α(φ)·y + β(φ)·v.

Among all densities with zero mean and identity covariance N(0, I) has the largest entropy, and latents are scaled to
unit variance. Where x0 and ε are independent N(0, I), so are y and v, and E[v | y] = 0: **the maximum-entropy
prediction is zero velocity**. The sampler's path dy/dφ = v then stands still, and denoising halts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.schedule import DiscreteSchedule, FlowSchedule, Schedule

PARAMETRISATIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda sin, cos: (sin, cos),  # ε
    "sample": lambda sin, cos: (cos, -sin),  # x0
    "v_prediction": lambda sin, cos: (torch.zeros_like(sin), torch.ones_like(sin)),  # cos φ·ε − sin φ·x0
    "flow_prediction": lambda sin, cos: (sin - cos, sin + cos),  # ε − x0
}
"""Functions (sin φ, cos φ) -> (α, β), by the quantity that the network predicts."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""Parametrisations that a discrete schedule allows."""


@dataclass(frozen=True)
class DiffusionProcess:
    """A schedule and a parametrisation; `t` is the model's native time, [B].

    Attributes:
        schedule: Signal and noise at each time.
        parametrisation: Native prediction, a key of `PARAMETRISATIONS`.
    """

    schedule: Schedule
    parametrisation: str

    def angle(self, t: Tensor) -> Tensor:
        """Return φ, 0 (clean) to π/2 (noise), [B]."""
        a, s = self.schedule.coefficients(t)
        return torch.atan2(s, a)

    def halted_std(self, t: Tensor) -> Tensor:
        """Return √(a² + s²), the standard deviation of x_t for x0 ~ N(0, I), [B]."""
        return torch.hypot(*self.schedule.coefficients(t))

    def x_t(self, y: Tensor, t: Tensor) -> Tensor:
        """Scale y to the network's input x_t = √(a² + s²)·y, [B, ...]; halted noise is y ~ N(0, I)."""
        return _like(self.halted_std(t), y) * y

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = a·x0 + s·ε, [B, ...]."""
        a, s = self.schedule.coefficients(t)
        return _like(a, x0) * x0 + _like(s, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the training target for x0 and ε in the native parametrisation, [B, ...]."""
        sin, cos, alpha, beta = self._factors(t, x0)
        return (alpha * cos - beta * sin) * x0 + (alpha * sin + beta * cos) * noise

    def prediction(self, velocity: Tensor | float, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the native prediction α·y + β·v of a velocity, [B, ...]."""
        _, _, alpha, beta = self._factors(t, x_t)
        return alpha * x_t / _like(self.halted_std(t), x_t) + beta * velocity

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity v = dy/dφ of a native prediction, [B, ...]; the inverse of `prediction`."""
        _, _, _, beta = self._factors(t, x_t)
        return (prediction - self.max_entropy_target(x_t, t)) / beta

    def max_entropy_target(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return E[target | x_t] for x0 ~ N(0, I), the native prediction of zero velocity, [B, ...]."""
        return self.prediction(0.0, x_t, t)

    def _factors(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return sin φ, cos φ, α and β, each in the shape that multiplies x."""
        a, s = self.schedule.coefficients(t)
        width = torch.hypot(a, s)
        sin, cos = s / width, a / width
        alpha, beta = PARAMETRISATIONS[self.parametrisation](sin, cos)
        return _like(sin, x), _like(cos, x), _like(alpha, x), _like(beta, x)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Reshape values [B] to multiply x [B, ...]."""
    return values.to(x).view(-1, *[1] * (x.dim() - 1))


def variance_preserving(alphas_cumprod: Tensor, prediction_type: str) -> DiffusionProcess:
    """Return the process of a discrete schedule of betas.

    Args:
        alphas_cumprod: a² at every timestep, [T].
        prediction_type: One of `PREDICTION_TYPES`.

    Raises:
        OptionError: The prediction type is unknown, or is ε although the last timestep holds no signal.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise OptionError("--prediction_type", prediction_type, f"must be one of {', '.join(PREDICTION_TYPES)}")
    if prediction_type == "epsilon" and float(alphas_cumprod[-1]) == 0:
        text = (
            "says nothing about the picture at the last timestep, which is pure noise (rescale_betas_zero_snr): give "
            "--prediction_type v_prediction if that is what the model was trained for"
        )
        raise OptionError("--prediction_type", prediction_type, text)
    return DiffusionProcess(DiscreteSchedule(alphas_cumprod), prediction_type)


def flow_matching(num_train_timesteps: int = 1000, shift: float = 1.0) -> DiffusionProcess:
    """Return the process of flow matching; see `FlowSchedule` for the arguments."""
    return DiffusionProcess(FlowSchedule(num_train_timesteps, shift), "flow_prediction")


def check_variance_preserving(scheduler: Any) -> None:
    """Check that a diffusers scheduler has a discrete variance-preserving process.

    Raises:
        OptionError: The scheduler is for continuous noise levels (such as EDM's), flow matching or consistency models.
    """
    config, name = scheduler.config, type(scheduler).__name__
    odd = config.get("timestep_type", "discrete") != "discrete" or config.get("use_flow_sigmas")
    if not hasattr(scheduler, "alphas_cumprod") or odd:
        text = "has no discrete schedule of betas, which this model family needs"
        raise OptionError("--pretrained_model_name_or_path", f"scheduler {name}", text)


def from_scheduler(scheduler: Any) -> DiffusionProcess:
    """Return the process of a diffusers scheduler.

    Raises:
        OptionError: The scheduler is neither variance preserving nor flow matching.
    """
    name = type(scheduler).__name__
    if "FlowMatch" in name:
        return flow_matching(scheduler.config.num_train_timesteps, float(scheduler.config.get("shift", 1.0)))
    if hasattr(scheduler, "alphas_cumprod"):
        return variance_preserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    raise OptionError("--pretrained_model_name_or_path", name, "is a scheduler without a known noise process")
