"""Training of base models and judges: a time budget, resuming, learning rates and averaged weights."""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from safemax_sd.core.errors import SafemaxError

SAVE_SECONDS = 120
"""Seconds between two saves of a run."""
DIVERGED = 1.5
"""Factor above its lowest value at which the average loss of a diffusion model has diverged."""


class TimedRun:
    """A training of a set number of minutes, which continues after it was killed.

    Schedules follow the fraction of the budget that is spent rather than a number of steps: on a slower machine the
    same minutes give fewer steps, but still a complete schedule.

    Args:
        path: File that stores the run; if it exists, the run continues from it.
        network: Network to train.
        optimizer: Optimizer of the network; its learning rate is the highest of the schedule.
        minutes: Budget in minutes of `clock`.
        ema_decay: Decay of the averaged network.
        label: Label of the progress bar.
        highest_rise: Factor above its lowest value at which the average loss has diverged; without limit by default.
        clock: Clock in seconds; `time.process_time` makes the budget independent of other load on the machine.

    Attributes:
        loss: Average loss of about the last hundred steps; NaN before the first.
        lowest: Lowest average loss so far.
        previous: File with the save before the last, for a training that has diverged.
        ema: Network with averaged parameters.
        step: Number of steps taken.
        bar: Progress bar in seconds.
    """

    def __init__(
        self,
        path: Path,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        minutes: float,
        ema_decay: float,
        label: str,
        highest_rise: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.network, self.optimizer, self.clock = path, network, optimizer, clock
        self.previous = path.with_suffix(".previous.pt")
        self.ema, self.ema_decay = copy.deepcopy(network).eval().requires_grad_(False), ema_decay
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        self.step, self.spent, self.budget = 0, 0.0, 60.0 * minutes
        self.loss, self.lowest, self.highest_rise = math.nan, math.inf, highest_rise
        self._state: dict[str, Any] = {"model": network, "ema": self.ema, "optimizer": optimizer}
        if path.exists():
            stored = torch.load(path, weights_only=True)
            self.step, self.spent = stored["step"], stored["spent"]
            self.loss, self.lowest = stored["loss"], stored["lowest"]
            for name, part in self._state.items():
                part.load_state_dict(stored[name])
        self.bar = tqdm(total=round(self.budget), initial=round(self.spent), unit="s", desc=label)
        self._last, self._saved = clock(), time.monotonic()

    @property
    def progress(self) -> float:
        """Fraction of the budget that is spent, 0 to 1."""
        return min(1.0, self.spent / self.budget)

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the budget, after work that is not training."""
        self._last = self.clock()

    def update(self, loss: Tensor, factor: float) -> None:
        """Take an optimizer step, with gradients clipped to norm 1, and save every two minutes and at the end.

        Args:
            loss: Loss of the step.
            factor: Factor of the learning rate.

        Raises:
            SafemaxError: The training has diverged.
        """
        self._watch(loss.item())
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self._average()
        now = self.clock()
        self.spent, self._last, self.step = self.spent + now - self._last, now, self.step + 1
        if time.monotonic() - self._saved > SAVE_SECONDS or self.spent >= self.budget:
            self.save()
        self.bar.update(round(self.spent) - self.bar.n)

    def _watch(self, loss: float) -> None:
        """Put a step's loss into the average; raise if that has risen too far."""
        self.loss = loss if math.isnan(self.loss) else self.loss + 0.01 * (loss - self.loss)
        self.lowest = min(self.lowest, self.loss)
        if not self.loss <= self.highest_rise * self.lowest:
            text = f"the loss has risen from {self.lowest:.4f} to {self.loss:.4f} by step {self.step}: copy "
            raise SafemaxError(f"{text}{self.previous} to {self.path} and lower the learning rate")

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged parameters toward the current ones, faster in the first steps."""
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        averaged = list(self.ema.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in self.network.parameters()], 1 - decay)

    def save(self) -> None:
        """Save the run."""
        parts = {name: part.state_dict() for name, part in self._state.items()}
        temporary = self.path.with_suffix(".tmp")
        numbers = {"step": self.step, "spent": self.spent, "loss": self.loss, "lowest": self.lowest}
        torch.save({**numbers, **parts}, temporary)
        if self.path.exists():
            shutil.copyfile(self.path, self.previous)
        os.replace(temporary, self.path)
        self._saved = time.monotonic()


def processor_seconds() -> float:
    """Return this process's processor time for each of torch's threads, to which other load adds nothing."""
    return time.process_time() / torch.get_num_threads()


def positive(text: str) -> float:
    """Read a number above 0 from a command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def linear_factor(step: int, progress: float, *, warmup_steps: int, decay_fraction: float) -> float:
    """Return a linear warm-up over steps, then 1, then a linear decay to 0 in the last `decay_fraction` of the run."""
    return min(1.0, (step + 1) / warmup_steps) * min(1.0, max(0.0, (1 - progress) / decay_fraction))


def cosine_factor(step: int, progress: float, *, warmup_steps: int = 100) -> float:
    """Return a linear warm-up over steps, times half a cosine over the run."""
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


def min_snr_weights(signal: Tensor, gamma: float, prediction_type: str = "epsilon") -> Tensor:
    """Return the weights of the loss on predictions that bound its weight as an x0-loss by `gamma`.

    As an x0-loss, one on ε has the weight SNR (arXiv 2303.09556, eq. 5) and one on v the weight SNR + 1 (arXiv
    2202.00512, section 4).

    Args:
        signal: Signal power a² of a variance-preserving process by timestep, [T].
        gamma: Highest weight of the x0-loss.
        prediction_type: `epsilon` or `v_prediction`.
    """
    of_x0 = {"epsilon": signal / (1 - signal), "v_prediction": 1 / (1 - signal)}[prediction_type]
    return (gamma / of_x0).clamp(max=1.0)


def lognormal_times(signal: Tensor, mean: float, std: float) -> Tensor:
    """Return the probabilities of timesteps at which ln σ is normally distributed (EDM, arXiv 2206.00364, table 1).

    σ is the ratio of noise to signal. Of timesteps drawn evenly from DDPM's linear schedule, 43 % have σ > 5, where
    hardly more than a class's mean picture can be predicted.

    Args:
        signal: Signal power a² of a variance-preserving process by timestep, increasing in noise, [T].
        mean: Mean of ln σ.
        std: Standard deviation of ln σ.

    Returns:
        Probabilities, [T].
    """
    log_sigma = (1 / signal - 1).log() / 2
    (spacing,) = torch.gradient(log_sigma)
    density = spacing * (-((log_sigma - mean) ** 2) / (2 * std**2)).exp()
    return density / density.sum()


def has_bfloat16() -> bool:
    """Tell whether the CPU has hardware for bfloat16, without which it is ten times slower."""
    return torch.cpu._is_avx512_bf16_supported()


def mixed_precision(wanted: bool = True) -> torch.autocast:
    """Return autocast to bfloat16, disabled if it is not wanted or the CPU has no hardware for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and has_bfloat16())
