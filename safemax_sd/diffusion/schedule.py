"""Noise schedules: the signal and the noise of x_t = a·x0 + s·ε at a model's native times."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

CONTINUOUS_TIMES = 1000
"""Points of the even grid that stands for a continuous time."""


class Schedule(ABC):
    """Signal a and noise s of a forward process; `t` is the model's native time, [B]."""

    @abstractmethod
    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw native times as in the model's training, [n]."""

    def sample_time_below(self, bound: float, generator: torch.Generator) -> Tensor:
        """Draw a native time as in the model's training, [1], with a noise level t/T below `bound`."""
        t = self.sample_times(1, generator)
        while float(self.noise_level(t)) >= bound:
            t = self.sample_times(1, generator)
        return t

    @abstractmethod
    def all_times(self) -> Tensor:
        """Return the native times of training from clean to noise, [T]; an even grid if time is continuous."""

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """Return t/T: 0 (clean) to 1 (noise), float32 [B]."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and s, each float32 [B]."""


class DiscreteSchedule(Schedule):
    """Variance-preserving schedule, a² + s² = 1 (DDPM, arXiv 2006.11239, eq. 4); native time is an integer timestep.

    Args:
        alphas_cumprod: a² at every timestep, [T].
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.float()

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.alphas_cumprod), (n,), generator=generator)

    def all_times(self) -> Tensor:
        return torch.arange(len(self.alphas_cumprod))

    def noise_level(self, t: Tensor) -> Tensor:
        return t.float() / (len(self.alphas_cumprod) - 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.alphas_cumprod.to(t.device)[t.long()]
        return signal.sqrt(), (1 - signal).sqrt()


class FlowSchedule(Schedule):
    """Linear schedule, a = 1 − σ and s = σ (rectified flow, arXiv 2209.03003); native time is σ·num_train_timesteps.

    Args:
        num_train_timesteps: Scale of the native time.
        shift: Shift of training and sampling to high noise, 1 for none (arXiv 2403.03206, eq. 23).
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self.num_train_timesteps, self.shift = num_train_timesteps, shift

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        return self._shifted(torch.rand(n, generator=generator))

    def all_times(self) -> Tensor:
        return self._shifted((torch.arange(CONTINUOUS_TIMES) + 0.5) / CONTINUOUS_TIMES)

    def _shifted(self, uniform: Tensor) -> Tensor:
        return self.num_train_timesteps * self.shift * uniform / (1 + (self.shift - 1) * uniform)

    def noise_level(self, t: Tensor) -> Tensor:
        return t.float() / self.num_train_timesteps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.noise_level(t)
        return 1 - sigma, sigma
