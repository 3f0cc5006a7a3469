"""What trainings of base models and judges share: a clock that survives being killed, learning rates, EMA."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


class TimedRun:
    """A training of a set number of minutes that can be killed and started again.

    The schedule follows the share of the time budget used up, not a step count: on a slower machine the same
    minutes give fewer steps but still a complete schedule.
    """

    def __init__(
        self,
        path: Path,
        minutes: float,
        state: dict[str, object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Resume from `path` if it exists.

        Args:
            path: File that holds the run between two starts.
            minutes: Budget, in minutes of `clock`.
            state: Modules and optimizers to save, by name.
            clock: Seconds passed; `time.process_time` makes the budget independent of what else the machine does.
        """
        self.path, self.budget, self.state, self.clock = path, 60.0 * minutes, state, clock
        self.step, self.spent, self._since_save = 0, 0.0, time.monotonic()
        if path.exists():
            stored = torch.load(path, weights_only=True)
            self.step, self.spent = stored["step"], stored["spent"]
            for name, part in state.items():
                part.load_state_dict(stored[name])  # type: ignore[attr-defined]
        self._last = clock()

    @property
    def share(self) -> float:
        """Share of the budget used, 0 to 1."""
        return min(1.0, self.spent / self.budget)

    def tick(self) -> bool:
        """Count one step; save every two minutes and at the end. Returns whether to go on."""
        now = self.clock()
        self.spent, self._last, self.step = self.spent + now - self._last, now, self.step + 1
        if time.monotonic() - self._since_save > 120 or self.spent >= self.budget:
            self.save()
            self._since_save = time.monotonic()
        return self.spent < self.budget

    def save(self) -> None:
        parts = {name: part.state_dict() for name, part in self.state.items()}  # type: ignore[attr-defined]
        temporary = self.path.with_suffix(".tmp")
        torch.save({"step": self.step, "spent": self.spent, **parts}, temporary)
        os.replace(temporary, self.path)


def learning_rate_factor(step: int, share: float, *, warmup_steps: int, decay_share: float) -> float:
    """Linear warm-up over steps, then 1, then linear decay to 0 over the last `decay_share` of the budget."""
    return min(1.0, (step + 1) / warmup_steps) * min(1.0, max(0.0, (1 - share) / decay_share))


def cosine_factor(step: int, share: float, *, warmup_steps: int = 100) -> float:
    """Linear warm-up over steps, then half a cosine over the budget."""
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * share))


class Ema:
    """Exponential moving average of a module's parameters, warmed up so that early steps count less."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged = list(self.module.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in module.parameters()], 1 - decay)


def mixed_precision() -> torch.autocast:
    """bfloat16 autocast where the processor multiplies it in hardware; elsewhere it would be ten times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())
