"""Samples of a training step: positions within the step, draws at them, and the batch that the loss gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning
from safemax_sd.objectives.options import ObjectiveOptions
from safemax_sd.recording.replay import Samples


@dataclass(frozen=True)
class Positions:
    """Numbers of a batch's samples within a step, by which micro-batches and processes split the step exactly.

    Attributes:
        seed: Seed of the run.
        step: Optimizer step, from 0.
        forget: Numbers of the forget samples within the step.
        retain: Numbers of the retain samples within the step.
    """

    seed: int
    step: int
    forget: range
    retain: range

    @classmethod
    def of_part(cls, config: ObjectiveOptions, step: int, part: int) -> Self:
        """Return the positions of one micro-batch of one process, given its number among all parts of the step."""

        def share(size: int) -> range:
            return range(part * size, (part + 1) * size)

        return cls(config.seed, step, share(config.train_batch_size), share(config.retain_samples))

    def generator(self, kind: int, number: int) -> torch.Generator:
        """Return the generator of one sample, a function of (seed, step, kind, number) alone."""
        mixed = 0x243F6A8885A308D3
        for word in (self.seed, self.step, kind, number):
            mixed = ((mixed ^ word) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 29
        return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True)
class Draw:
    """Random draws of an objective for one micro-batch, on the CPU: a `Batch`, or the input that one is made from."""

    def to(self, device: torch.device) -> Self:
        """Copy the draw to a device."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, _MOVABLE)}
        return replace(self, **moved)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of at least one part; only for draws whose fields are tensors and conditionings."""
        columns = ([getattr(part, entry.name) for part in parts] for entry in fields(cls))
        return cls(
            *(Conditioning.cat(rows) if isinstance(rows[0], Conditioning) else torch.cat(rows) for rows in columns)
        )


_MOVABLE = (Tensor, Conditioning, Draw)


@dataclass(frozen=True)
class Rows(Draw):
    """Samples with their targets.

    Attributes:
        x_t: Noisy latents, [B, *latent].
        t: Native time, [B].
        conditioning: Conditioning of the samples, one row each.
        target: Target of the prediction, [B, *latent].
    """

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor


@dataclass(frozen=True)
class Batch(Rows):
    """Samples of one fused forward pass.

    Attributes:
        is_forget: True for forget samples, bool [B].
        reach_calls: Network evaluations that `Objective.reach` took, counted per sample.
    """

    is_forget: Tensor
    reach_calls: int = field(default=0, kw_only=True)

    @property
    def model_calls(self) -> int:
        """Network evaluations that the batch takes, counted per sample."""
        return len(self.t) + self.reach_calls


PRIOR_STEP = -1
"""Number that stands for the training step in draws of a prior."""
EMPTY_SHARE = 0.1
"""Fraction of a denoising loss's samples with the empty prompt, as in the base model's training."""


def prior_generator(seed: int, kind: int, number: int) -> torch.Generator:
    """Return the generator of one draw of a prior, which belongs to no step; see `Positions.generator`."""
    return Positions(seed, PRIOR_STEP, range(0), range(0)).generator(kind, number)


def draw_noised(
    samples: Samples, process: DiffusionProcess, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a sample of the denoising loss; returns x0, ε, native time and row of the prompt, each of one row."""
    return noised(samples, torch.randint(len(samples), (1,), generator=generator), process, generator)


def noised(
    samples: Samples, row: Tensor, process: DiffusionProcess, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw noise and native time for the clean sample of a row [1]; returns the same as `draw_noised`."""
    x0 = samples.x0[row]
    noise = torch.randn(x0.shape, generator=generator)
    return x0, noise, process.schedule.sample_times(1, generator), samples.prompt[row]


def drop_prompt(prompts: Conditioning, row: Tensor, empty: Conditioning, generator: torch.Generator) -> Conditioning:
    """Return the conditioning of the prompt of a row [1] or, with probability `EMPTY_SHARE`, of the empty prompt."""
    return empty if torch.rand((), generator=generator) < EMPTY_SHARE else prompts.select(row)
