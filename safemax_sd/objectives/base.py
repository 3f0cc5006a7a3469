"""The interface of an erasure objective: draw a batch, turn predictions into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from safemax_sd.config import TrainConfig
from safemax_sd.families import Conditioning
from safemax_sd.process import DiffusionProcess
from safemax_sd.registry import Registry
from safemax_sd.replay import ReplayBank

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t, t, conditioning) -> the student's native prediction, float32 [B, *latent]."""


@dataclass(frozen=True)
class ErasureData:
    """What every objective may draw from.

    Attributes:
        process: Noise mathematics of the model.
        latent_shape: Of one sample.
        forget: Conditioning of the forbidden prompts, one row each.
        retain: Conditioning of the prompts to keep.
        empty: Conditioning of the empty prompt, one row.
        forget_bank: The frozen model's trajectories for the forbidden prompts.
        retain_bank: The same for the prompts to keep.
    """

    process: DiffusionProcess
    latent_shape: tuple[int, ...]
    forget: Conditioning
    retain: Conditioning
    empty: Conditioning
    forget_bank: ReplayBank
    retain_bank: ReplayBank


@dataclass(frozen=True)
class Batch:
    """Samples of one fused forward pass.

    Attributes:
        x_t: [B, *latent].
        t: Native time, [B].
        conditioning: One row a sample.
        target: Wanted prediction, [B, *latent].
        weight: Of each sample's squared error, [B].
        is_forget: bool [B].
        empty_row: Row of the same input with the empty prompt, of which a guided prediction starts; -1 where the batch
            holds none; int64 [B].
    """

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor
    weight: Tensor
    is_forget: Tensor
    empty_row: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{entry.name: getattr(self, entry.name).to(device) for entry in fields(self)})


@dataclass(frozen=True)
class LossTerms:
    """A loss and its parts, each a scalar tensor."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Positions:
    """Which samples of a training step a batch holds, so that micro-batches and processes split a step exactly.

    Attributes:
        seed: Of the run.
        step: Optimizer step, from 0.
        forget: Numbers of the forget samples within the step.
        retain: Numbers of the retain samples within the step.
    """

    seed: int
    step: int
    forget: range
    retain: range

    def generator(self, kind: int, number: int) -> torch.Generator:
        """The generator of one sample: a function of (seed, step, kind, number) and nothing else."""
        mixed = 0x243F6A8885A308D3
        for word in (self.seed, self.step, kind, number):
            mixed = ((mixed ^ word) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 29
        return torch.Generator().manual_seed(mixed)


class Objective(ABC):
    """An erasure method as a loss on batches.

    Attributes:
        name: Value of `--objective`.
        paper: Where it was published.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def __init__(self, config: TrainConfig, data: ErasureData) -> None:
        """Keep what is needed of the training flags and the data; no work beyond that."""

    @abstractmethod
    def draw(self, positions: Positions) -> Batch:
        """The samples at these positions of a step, on the processor's memory."""

    @abstractmethod
    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        """Loss of one batch: one fused student forward."""


OBJECTIVES: Registry[Objective] = Registry("objective", Objective, "safemax_sd.objectives")  # type: ignore[type-abstract]
