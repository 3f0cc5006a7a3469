"""D(t): how much each noise level counts in the forget loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safemax_sd.core.errors import OptionError

KINDS = ("exponential", "constant", "linear", "cutoff")


@dataclass(frozen=True)
class Decay:
    """Weight of a forget sample by its noise level u = t/T in 0 (clean) to 1 (noise).

    - `exponential`: exp(-λ·u), the method's own (SAFEMax, arXiv 2508.20773).
    - `constant`: 1.
    - `linear`: 1 - λ·u, at least 0.
    - `cutoff`: 1 up to u = λ, then 0.

    Args:
        kind: One of `KINDS`.
        decay_lambda: λ, at least 0.

    Raises:
        OptionError: Unknown kind or negative λ.
    """

    kind: str = "exponential"
    decay_lambda: float = 1.0  # λ in D(t)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError("--decay", self.kind, f"must be one of {', '.join(KINDS)}")
        if not self.decay_lambda >= 0:
            raise OptionError("--decay_lambda", self.decay_lambda, "must be 0 or more")

    def __call__(self, noise_level: Tensor) -> Tensor:
        """Weights, float32 [B], of noise levels [B]."""
        u = noise_level.float()
        if self.kind == "exponential":
            return torch.exp(-self.decay_lambda * u)
        if self.kind == "linear":
            return (1 - self.decay_lambda * u).clamp(min=0)
        if self.kind == "cutoff":
            return (u <= self.decay_lambda).float()
        return torch.ones_like(u)
